"""Writing files whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from mrcnf.errors import UserError


def write(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name, then rename it; missing folders are made.

    Raises:
        UserError: it cannot be written; then what was there before still is.
    """
    if not path.name or path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); choose another place") from None
