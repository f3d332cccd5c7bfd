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
from pathlib import Path
from typing import Any

import numpy as np

from mrcnf.data.imagefile import reading
from mrcnf.errors import UserError


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels, and the array `photo` (N,) of names or numbers if there is one; never unpickles.

    The pixels are the array `images` or `data`: uint8 (N,H,W,C), (N,H,W) or (N,3·H·H), C = 1 or 3.
    """
    with reading(path, "an npz archive"), zipfile.ZipFile(path) as archive:
        names, arrays = archive.namelist(), {}
        for key in ("images", "data", "photo"):
            if f"{key}.npy" in names:
                arrays[key] = _npy(archive, archive.getinfo(f"{key}.npy"), path.stat().st_size)
    pixels, photo = arrays.get("images", arrays.get("data")), arrays.get("photo")
    if pixels is None:
        raise UserError(f"{path}: has no array 'images' or 'data'; give it one")
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim == 2 and 3 * (side := math.isqrt(pixels.shape[1] // 3)) ** 2 == pixels.shape[1]:
        pixels = pixels.reshape(len(pixels), 3, side, side).transpose(0, 2, 3, 1)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        raise UserError(f"{path}: images are {pixels.dtype} {pixels.shape}; they must be uint8 "
                        "(N,H,W,C), (N,H,W) or (N,3·H·H), with C = 1 or 3")
    if photo is not None and (photo.shape != (len(pixels),) or photo.dtype.kind not in "USiu"):
        raise UserError(f"{path}: 'photo' must hold one name or number for each image")
    return pixels.transpose(0, 3, 1, 2), photo


def _npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, length: int) -> np.ndarray:
    # Both sizes come from the file. Deflate expands by 1032 at most; other methods have no bound.
    ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}[member.compress_type]
    if member.compress_size > length or member.file_size > ratio * member.compress_size:
        raise ValueError(f"{member.filename} claims more bytes than the file has")
    data = archive.read(member)
    stream = io.BytesIO(data)
    first = np.lib.format.read_magic(stream) == (1, 0)
    header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds pickled objects, which are not loaded")
    flat = np.frombuffer(data[stream.tell() :], dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


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
