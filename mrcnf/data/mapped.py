"""Images in a .npy file that stay there: memory-mapped, and read as they are asked for."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mrcnf.data.formats import npy_header
from mrcnf.data.imagefile import reading
from mrcnf.data.streams import PART, Stream
from mrcnf.errors import UserError


@dataclass(frozen=True)
class Description:
    """What `mrcnf.data.packing` says of the file that it wrote, in FILE.info.json beside it."""

    name: str
    """The data that were packed, as `mrcnf.data.load` knows them."""
    split: str
    resolution: int
    """What was asked for; 0: nothing."""
    crop: int
    shape: tuple[int, ...]
    """(N, C, H, W)."""
    sha256: str
    """As `Images.sha256`."""
    size: int
    """Of the file, in bytes."""
    modified: int
    """When the file was last written to, in nanoseconds: a hash is believed as long as it is so."""

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def beside(path: Path, what: str) -> Path:
    """FILE.info.json or FILE.groups.npy of FILE.npy."""
    return path.with_name(path.name.removesuffix(".npy") + what)


def describe(path: Path) -> Description | None:
    """What was said of a file when it was packed; None for others.

    Raises UserError if that is damaged.
    """
    place = beside(path, ".info.json")
    if not place.is_file():
        return None
    with reading(place, "what was packed"):
        table: dict[str, Any] = json.loads(place.read_text())
        found = Description(**table)
        kinds = {"name": str, "split": str, "sha256": str, "size": int, "modified": int}
        if any(type(table[key]) is not kind for key, kind in kinds.items()):
            raise ValueError("a value is of another type")
        return found


class State(NamedTuple):
    """Of a file: which one it is, how long, and when it was last written to."""

    st_dev: int
    st_ino: int
    st_size: int
    st_mtime_ns: int


class Mapped:
    """uint8 images of a .npy file, (N,C,H,W), (N,H,W,C) or (N,H,W) in C order, C = 1 or 3.

    Nothing but what `take` and `digest` are asked for is read. The file must not change meanwhile:
    they raise UserError if it has.

    Raises UserError for files that are missing, truncated or hold something else.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._rows, self._whole = path, None, True
        with reading(path, "a .npy file"), open(path, "rb") as file:
            self._opened = _state(path)
            shape, fortran, dtype = npy_header(file)
            if dtype != np.uint8 or fortran or len(shape) not in (3, 4):
                raise UserError(f"{path}: holds {dtype} {shape}{' in Fortran order' * fortran}; "
                                "it must be uint8 (N,C,H,W), (N,H,W,C) or (N,H,W) in C order")
            start, count, size = file.tell(), math.prod(shape), self._opened.st_size
            if start + count != size:
                raise ValueError(f"it has {size} bytes, where its header says {start + count}")
            if not count:
                raise UserError(f"{path}: holds no images; write some into it")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        array = np.frombuffer(self._map, np.uint8, count, start).reshape(shape)
        array = array[..., None] if len(shape) == 3 else array
        self._last = array.shape[1] not in (1, 3)  # channels
        if self._last and array.shape[3] not in (1, 3):
            raise UserError(f"{path}: images are {shape[1:]}; the first or the last of these must "
                            "be their channels, 1 or 3")
        self._array = array
        # Neighbours in the file are not neighbours in an epoch: do not read ahead.
        self._advise("MADV_RANDOM")

    def _advise(self, name: str) -> None:
        if hasattr(mmap, name):  # not on every system
            self._map.madvise(getattr(mmap, name))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        _, a, b, c = self._array.shape
        return (len(self), c, a, b) if self._last else (len(self), a, b, c)

    def __len__(self) -> int:
        return len(self._array if self._rows is None else self._rows)

    def chosen(self, rows: np.ndarray) -> Mapped:
        """The images of some rows, bool (N,), of the same map."""
        return self._part(rows=np.flatnonzero(rows))

    def first(self, limit: int | None) -> Mapped:
        """The first that many; all for None."""
        if limit is None or limit >= len(self):
            return self
        if self._rows is not None:
            return self._part(rows=self._rows[:limit])
        return self._part(array=self._array[:limit])

    def _part(self, **changes: np.ndarray) -> Mapped:
        other = copy.copy(self)
        other.__dict__.update({f"_{name}": value for name, value in changes.items()}, _whole=False)
        return other

    def check(self) -> None:
        """A UserError if the file is not the one that was opened, or not as it was then."""
        try:
            unchanged = _state(self.path) == self._opened
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            raise UserError(f"{self.path}: has changed since it was opened; leave it as it is, and "
                            "begin again")

    def take(self, index: np.ndarray, *, pinned: bool = False) -> torch.Tensor:
        """Images by number (n,), from 0: uint8 (n, C, H, W), in page-locked memory if asked for."""
        rows = index if self._rows is None else self._rows[index]
        shape, direct = (len(rows), *self._array.shape[1:]), pinned and not self._last
        found = torch.empty(shape, dtype=torch.uint8, pin_memory=direct)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._array):
            raise IndexError(f"there are images 0 to {len(self) - 1}")
        self.check()  # a page that is no longer there would kill the process
        # NumPy's, which needs no threads beside those that train; "clip" spares it a copy.
        np.take(self._array, rows, axis=0, out=found.numpy(), mode="clip")
        self.check()
        if not self._last:
            return found
        turned = found.permute(0, 3, 1, 2).contiguous()
        return turned.pin_memory() if pinned else turned

    def tensor(self) -> torch.Tensor:
        """All of them, uint8 (N, C, H, W): the map itself where it can be, not to be written to."""
        if self._rows is not None:
            return self.take(np.arange(len(self._rows)))
        array = self._array.transpose(0, 3, 1, 2) if self._last else self._array
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of memory that cannot be written to
            return torch.from_numpy(array)

    def stream(self) -> Stream:
        """The images, from the first to the last."""
        step = max(1, PART // math.prod(self.shape[1:]))

        def parts(start: int) -> Iterator[np.ndarray]:
            self._advise("MADV_SEQUENTIAL")
            try:
                for first in range(start, self.shape[0], step):
                    index = np.arange(first, min(first + step, self.shape[0]))
                    yield self.take(index).numpy()
            finally:
                self._advise("MADV_RANDOM")

        return Stream(self.shape, parts, files=(self.path,))

    @property
    def sha256(self) -> str:
        """As `Images.sha256`: noted when the file was packed, or read anew."""
        known, now = describe(self.path), self._opened
        if known and self._whole and (known.size, known.modified) == (now.st_size, now.st_mtime_ns):
            return known.sha256
        return digest(self.stream())


def _state(path: Path) -> State:
    found = path.stat()
    return State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def digest(stream: Stream) -> str:
    """Hexadecimal SHA-256 of shape and pixels."""
    found = hashlib.sha256(repr(stream.shape).encode())
    for part in stream.parts(0):
        found.update(np.ascontiguousarray(part).data)
    return found.hexdigest()
