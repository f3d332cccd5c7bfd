"""Readers of published formats: from a path to uint8 (N, C, H, W).

Nothing read here is executed, and no length field is believed before the file's own length has
been asked: data sets come back truncated from downloads, and pickles can be hostile.

Every reader raises UserError, naming the file and the remedy, for files that are missing,
truncated, damaged or of another kind.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from mrcnf.data.imagefile import reading
from mrcnf.data.streams import PART, Stream, of_array
from mrcnf.errors import UserError


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels, and the array `photo` (N,) of names or numbers if there is one; never unpickles.

    The pixels are the array `images` or `data`: uint8 (N,H,W,C), (N,H,W) or (N,3·H·H), C = 1 or 3.
    """
    stream, photo = open_npz(path)
    return stream.array(), photo


def open_npz(path: Path) -> tuple[Stream, np.ndarray | None]:
    """As `read_npz`, but the pixels are read, and unpacked, a part at a time."""
    with reading(path, "an npz archive"), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        member = next((f"{k}.npy" for k in ("images", "data") if f"{k}.npy" in names), None)
        if member is None:
            raise UserError(f"{path}: has no array 'images' or 'data'; give it one")
        with _npy(archive, member, path) as (_, shape, fortran, dtype):
            pass
        photo = _array(archive, "photo.npy", path) if "photo.npy" in names else None
        whole = _array(archive, member, path) if fortran else None
    if photo is not None and (photo.shape != shape[:1] or photo.dtype.kind not in "USiu"):
        raise UserError(f"{path}: 'photo' must hold one name or number for each image")
    if whole is not None:  # its images lie across one another
        return replace(of_array(_channels_first(whole, path)), files=(path,)), photo
    alike = _channels_first(np.broadcast_to(np.empty((), dtype), shape), path)  # takes no memory
    size = max(1, math.prod(shape[1:]))
    step = max(1, PART // size)

    def parts(start: int) -> Iterator[np.ndarray]:
        with (
            reading(path, "an npz archive"),
            zipfile.ZipFile(path) as archive,
            _npy(archive, member, path) as (file, *now),
        ):
            if tuple(now) != (shape, fortran, dtype):
                raise ValueError("it has changed")
            file.seek(start * size, io.SEEK_CUR)
            for first in range(start, shape[0], step):
                count = min(step, shape[0] - first)
                if len(data := file.read(count * size)) < count * size:
                    raise ValueError("truncated")
                yield _channels_first(np.frombuffer(data, dtype).reshape(-1, *shape[1:]), path)
            if file.read(1):
                raise ValueError("longer than it says")

    count, channels, height, width = alike.shape
    return Stream((count, channels, height, width), parts, files=(path,)), photo


def _channels_first(pixels: np.ndarray, path: Path) -> np.ndarray:
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim == 2 and 3 * (side := math.isqrt(pixels.shape[1] // 3)) ** 2 == pixels.shape[1]:
        pixels = pixels.reshape(len(pixels), 3, side, side).transpose(0, 2, 3, 1)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        raise UserError(f"{path}: images are {pixels.dtype} {pixels.shape}; they must be uint8 "
                        "(N,H,W,C), (N,H,W) or (N,3·H·H), with C = 1 or 3")
    return pixels.transpose(0, 3, 1, 2)


@contextmanager
def _npy(
    archive: zipfile.ZipFile, name: str, path: Path
) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype]]:
    """A member's file, after its header, and what that says: shape, Fortran's order, type."""
    member, length = archive.getinfo(name), path.stat().st_size
    # Both sizes come from the file. Deflate expands by 1032 at most; other methods have no bound.
    ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}[member.compress_type]
    if member.compress_size > length or member.file_size > ratio * member.compress_size:
        raise ValueError(f"{name} claims more bytes than the file has")
    with archive.open(member) as file:
        shape, fortran, dtype = npy_header(file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects, which are not loaded")
        if math.prod(shape) * dtype.itemsize > member.file_size:
            raise ValueError(f"{name} claims more than it holds")
        yield file, shape, fortran, dtype


def _array(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    with _npy(archive, name, path) as (file, shape, fortran, dtype):
        flat = np.frombuffer(file.read(), dtype)
        return flat.reshape(shape, order="F" if fortran else "C")


def read_array(path: Path) -> np.ndarray:
    """The array of a .npy file; never unpickles."""
    with reading(path, "a .npy file"):
        return np.load(path, allow_pickle=False)


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type, of an array in NumPy's format; ValueError."""
    first = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    return read(file)


class _Inert:
    """Stands for NumPy's array and dtype in a pickle: keeps what it is given, runs nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    allowed: Mapping[str, Any] = {
        "numpy.core.multiarray._reconstruct": _Inert,
        "numpy._core.multiarray._reconstruct": _Inert,
        "numpy.ndarray": _Inert,
        "numpy.dtype": _Inert,
        "_codecs.encode": str.encode,  # how Python 3 writes bytes in protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise ValueError(f"it asks for {module}.{name}, which has no place in such a file")
        return self.allowed[f"{module}.{name}"]


def read_cifar(path: Path) -> np.ndarray:
    """A CIFAR batch, uint8 (N, 3, 32, 32): the rows `data` of a pickled dictionary.

    Format: https://www.cs.toronto.edu/~kriz/cifar.html. What a pickle
    asks for is looked up in a short list and never imported.
    """
    with reading(path, "a CIFAR batch"):
        data = path.read_bytes()
        # This pass checks every length. A memo index beyond the count of instructions would have
        # the unpickler clear gigabytes.
        for count, (code, number, _) in enumerate(pickletools.genops(data)):
            if code.name in ("PUT", "LONG_BINPUT") and (number or 0) > count:
                raise ValueError(f"instruction {count} is damaged")
        table = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        _, shape, dtype, fortran, raw = (table.get("data") or table[b"data"]).state
        if dtype.args[0] not in ("u1", b"u1") or fortran or len(shape) != 2 or shape[1] != 3072:
            raise ValueError(f"its data are {dtype.args[0]} {shape}")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        return np.frombuffer(raw, np.uint8).reshape(shape[0], 3, 32, 32)


def _inflate(data: Any, start: int, size: Callable[[bytes], int], wbits: int = 15) -> bytes:
    """A zlib stream of `start` bytes, from which `size` tells how many more there must be."""
    stream = zlib.decompressobj(wbits)
    head = stream.decompress(data, start)
    body = stream.decompress(stream.unconsumed_tail, size(head) + 1)
    if len(body) != size(head) or not stream.eof:
        raise ValueError("truncated, or longer than it says")
    return head + body


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of MNIST's kind, gzipped or not: uint8 (N, 1, H, W).

    Format: http://yann.lecun.com/exdb/mnist/, four big-endian words and then the bytes.
    """

    def shape(head: bytes) -> tuple[int, ...]:
        magic, count, height, width = struct.unpack_from(">4I", head)
        if magic != 0x803:
            raise ValueError("its magic number is not that of bytes in three dimensions")
        return count, 1, height, width

    with reading(path, "an IDX file of images"):
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = _inflate(data, 16, lambda head: math.prod(shape(head)), wbits=31)
        return np.frombuffer(data[16:], np.uint8).reshape(shape(data))


def read_mat(path: Path) -> np.ndarray:
    """The array `X` (H, W, C, N), first index fastest, of a MATLAB 5 file: uint8 (N, C, H, W).

    Format: MathWorks, "MAT-File Format", level 5. SVHN's labels beside it are not read.
    """
    with reading(path, "a MATLAB 5 file"):
        data = memoryview(path.read_bytes())
        if data[124:128] != b"\x00\x01IM":
            raise ValueError("it has another header")
        for kind, content in _mat_elements(data[128:]):
            if kind == 15:  # compressed: one element, whose second word is its size
                plain = _inflate(content, 8, lambda head: struct.unpack("<2I", head)[1])
                kind, content = next(_mat_elements(memoryview(plain)))
            if kind != 14:  # a matrix: flags, dimensions, name, real part
                continue
            _, dimensions, name, real = list(_mat_elements(content))[:4]
            if bytes(name[1]) == b"X" and real[0] == 2:  # unsigned bytes
                height, width, depth, count = np.frombuffer(dimensions[1], "<i4").tolist()
                flat = np.frombuffer(real[1], np.uint8)
                return flat.reshape(count, depth, width, height).transpose(0, 1, 3, 2)
        raise ValueError("it has no array X of bytes")


def _mat_elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from("<2I", data, at)
        start = at + 8
        if kind >> 16:  # small: size and type share the first word, the content is the second
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data):
            raise ValueError("truncated")
        yield kind, data[start : start + size]
        at = start + size if kind == 15 else start + size + (-(start + size - at) % 8)
