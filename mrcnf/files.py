"""Writing files whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
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


def write_all(folder: Path, contents: Iterable[tuple[str, bytes]]) -> None:
    """Write files into a folder, which is made if missing: all of them or none.

    Args:
        contents: names without folders, and bytes, made one after another.

    Raises:
        UserError: they cannot be written; then what was there before still is.
    """
    temporary = folder / f".{os.getpid()}.tmp"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        temporary.mkdir(parents=True)
        names = []
        for name, data in contents:
            if (folder / name).is_dir():
                raise IsADirectoryError(0, f"{name} is a folder")
            (temporary / name).write_bytes(data)
            names.append(name)
        for name in names:
            os.replace(temporary / name, folder / name)
        temporary.rmdir()
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()
        if not isinstance(error, OSError):
            raise
        why = error.strerror or error
        raise UserError(f"{folder}: cannot be written to ({why}); choose another place") from None
