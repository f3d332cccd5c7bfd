"""Any data set as one .npy file, a part at a time: what `npy:` reads, whatever does not fit memory.

FILE.npy, uint8 (N, C, H, W), comes with FILE.info.json (`mapped.Description`) and, of images that
have photographs, FILE.groups.npy, int64 (N,). Until all is done there is FILE.npy.part instead,
and FILE.npy.part.json, which says of what; the same call goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mrcnf import files
from mrcnf.data.mapped import Description, beside
from mrcnf.data.streams import PART, Stream
from mrcnf.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SECONDS = 5.0
"""Between notes of how far a file is on disk."""


def pack(
    stream: Stream,
    out: Path,
    *,
    name: str,
    split: str = "train",
    resolution: int | None = None,
    crop: int = 0,
    options: Mapping[str, Any] | None = None,
    report: Callable[[int], object] = lambda done: None,
) -> Description:
    """Write images into `out`, which ends in .npy; returns what is noted beside it.

    `name`, `split`, `resolution`, `crop`, `options`: where the stream is from. `report` is told how
    many images are written, again and again.

    Raises UserError if `out` exists, does not end in .npy, cannot be written or is being written by
    another process, if the disk has no room for it, and for what the stream raises. Whatever stops
    it, what is written so far stays, and the same call goes on from there.
    """
    about = {"name": name, "split": split, "resolution": resolution or 0, "crop": crop}
    source = {**about, "options": repr(options or {}), "shape": list(stream.shape),
              "files": _states(stream)}  # fmt: skip
    part, header = out.with_name(out.name + ".part"), _header(stream.shape)
    _check_free(out)
    with _writing(out):
        _check_room(part, len(header) + math.prod(stream.shape))
    with _writing(out), _alone(part) as file:
        _check_free(out)  # another process may have had the lock, and be done
        digest = hashlib.sha256(repr(stream.shape).encode())
        done = _recover(part, file, header, source, digest)
        report(done)
        noted = time.monotonic()
        try:
            for images in stream.parts(done):
                data = np.ascontiguousarray(images)
                file.write(data.data)
                digest.update(data.data)
                done += len(data)
                report(done)
                if time.monotonic() - noted > SECONDS:
                    _note(part, file, source, done)
                    noted = time.monotonic()
        finally:
            _note(part, file, source, done)
        if done != len(stream):
            raise UserError(f"{name}: gave {done} images where {len(stream)} were promised")
        found = os.fstat(file.fileno())
        described = Description(
            name, split, resolution or 0, crop, stream.shape, digest.hexdigest(),
            found.st_size, found.st_mtime_ns,
        )
        groups = beside(out, ".groups.npy")
        if stream.groups is not None:
            files.write(groups, _npy(stream.groups))
        else:
            groups.unlink(missing_ok=True)  # of an earlier file
        files.write(beside(out, ".info.json"), described.text())
        os.replace(part, out)
        _state(part).unlink()
    return described


def _header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _states(stream: Stream) -> str:
    """A hash of which files a stream is read from, their lengths and times."""
    digest = hashlib.sha256()
    for file in stream.files:
        found = file.stat()
        digest.update(f"{file} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _state(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _note(part: Path, file: BinaryIO, source: dict[str, Any], done: int) -> None:
    """Write down that so many images are on disk for certain."""
    file.flush()
    os.fsync(file.fileno())
    files.write(_state(part), json.dumps({"source": source, "images": done}) + "\n")


def _recover(
    part: Path, file: BinaryIO, header: bytes, source: dict[str, Any], digest: Any
) -> int:
    """How many images an interrupted call has left; the file ends after them, the digest has them.

    None if it was of another source.
    """
    try:
        state = json.loads(_state(part).read_text())
        done = int(state["images"]) if state["source"] == source else 0
    except (OSError, ValueError, KeyError, TypeError):
        done = 0
    end = len(header) + done * math.prod(source["shape"][1:])
    if done <= 0 or os.fstat(file.fileno()).st_size < end or file.read(len(header)) != header:
        file.seek(0)
        file.truncate()
        file.write(header)
        return 0
    while (left := end - file.tell()) > 0:
        digest.update(file.read(min(PART, left)))
    file.truncate(end)
    return done


def _check_free(out: Path) -> None:
    if out.suffix != ".npy":
        raise UserError(f"{out}: end the name in .npy")
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or choose another --out")


def _check_room(part: Path, size: int) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(part.parent).free
    needed = size - (part.stat().st_size if part.exists() else 0)
    if free < needed:
        raise UserError(f"{part}: needs {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are "
                        "free there; make room or choose another --out")


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """An open file that no other process packs into, at its beginning; made if it is missing."""
    with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{part}: another process is packing into it; wait for it, or "
                                "choose another --out") from None
        yield file


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where, why = error.filename or out, error.strerror or error
        raise UserError(f"{where}: {why}; mend that, and the same command goes on from there"
                        ) from None
