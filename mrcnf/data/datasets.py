"""Where images come from: published sets, folders and archives, all as uint8.

Nothing read here is executed, and no length field is believed before the file's own length has
been asked: data sets come back truncated from downloads, and pickles can be hostile.
"""

import hashlib
import io
import math
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pywt
import torch
from PIL import Image

from mrcnf.data.imagefile import read_image, reading
from mrcnf.errors import UserError

SPLITS = ("train", "test", "val")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")


@dataclass(frozen=True, eq=False)
class Images:
    """Images in memory: `pixels` uint8 (N, C, H, W) on the CPU, C being 1 or 3.

    `groups`, int64 (N,) or None, gives images of one source photograph the same number: they are
    correlated, so a bootstrap draws photographs.
    """

    pixels: torch.Tensor
    name: str
    split: str
    groups: torch.Tensor | None = None

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of shape and pixels; name, split and groups do not enter."""
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        digest.update(self.pixels.contiguous().numpy().data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)


def load(
    name: str, split: str = "train", *, root: str | Path = "", resolution: int | None = None,
    limit: int | None = None, download: bool = False,
) -> Images:
    """Reads one split, `train`, `test` or `val`, of a data set; `NAMES` lists the names.

    `photos`: crops of PyWavelets' three grey photographs; `_photos` says which regions.
    `cifar10`, `cifar100`, `svhn`, `fashion-mnist`: the published files (`train` and `test`).
    `imagenet32`, `imagenet64`: the new release of downsampled ImageNet (npz, anti-aliased; bits/dim
    differ from the withdrawn one's); its validation images are both `test` and `val`.
    `folder:PATH`: the image files below PATH in the order of their names; PATH/train, PATH/test,
    PATH/val if one exists, otherwise a hash of the name relative to PATH makes one file in ten
    `test`. Grey files among colour ones are repeated to three channels.
    `npz:PATH`: a folder of train.npz, test.npz, val.npz; or one file, where a hash of the index, or
    of the photograph, makes one in ten `test`. Arrays: `images` or `data`, uint8 (N,H,W,C), (N,H,W)
    or (N,3·H·H), and possibly `photo` (N,), names or numbers that become `groups`.

    `root`: folder of the published files; by default $MRCNF_DATA, otherwise ./data.
    `resolution` (pixels): images 2^k times as large are averaged over 2×2 pixels k times, rounding
    halves up each time; 28×28 images get borders of zeros to 32×32 first where `resolution`
    divides 32. Files of a folder are cropped to their central square and box-averaged. `photos`
    are cut at `resolution` (default 32, at most 128). `limit`: only the first that many images
    (those of `photos` alternate between photographs). `download`: fetch what is missing into
    `root` and check its published MD5 (needs the extra `data`).

    Raises UserError for unknown names and splits, missing or damaged files, arrays of another
    shape or type, sizes that do not lead to `resolution`, and splits without images.
    """
    if split not in SPLITS:
        raise UserError(f"data split '{split}' is unknown; choose one of {', '.join(SPLITS)}")
    if (resolution is not None and resolution < 1) or (limit is not None and limit < 1):
        raise UserError(f"resolution {resolution}, limit {limit}: must be at least 1")
    kind, _, place = name.partition(":")
    path, groups = Path(place).expanduser(), None
    if name == "photos":
        pixels, groups = _photos(split, resolution or 32)
        pixels = pixels[:limit]
    elif name in PUBLISHED:
        base = Path(root or os.environ.get("MRCNF_DATA") or "data").expanduser()
        pixels = _published(name, split, base, resolution, limit, download)
    elif kind == "folder" and place:
        pixels = _folder(path, split, resolution, limit)
    elif kind == "npz" and place:
        pixels, groups = _npz_split(path, split)
        pixels = _reduce(pixels[:limit], resolution, path)
    else:
        raise UserError(f"data name '{name}' is unknown; choose one of {', '.join(NAMES)}")
    if not pixels.size:
        raise UserError(f"{name}: split '{split}' has no images; add some or choose another split")
    tensor = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
    numbers = None if groups is None else torch.from_numpy(groups[:limit].astype(np.int64))
    return Images(tensor, name, split, numbers)


def _reduce(pixels: np.ndarray, resolution: int | None, where: Path) -> np.ndarray:
    """(N, C, H, H) → (N, C, resolution, resolution), as `load` says."""
    height, width = pixels.shape[2:]
    if resolution is None:
        return pixels
    if (height, width) == (28, 28) and 32 % resolution == 0:
        pixels = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2)))
    while height == width and pixels.shape[2] > resolution and pixels.shape[2] % 2 == 0:
        rows = pixels[:, :, ::2].astype(np.uint16) + pixels[:, :, 1::2]
        pixels = ((rows[..., ::2] + rows[..., 1::2] + 2) >> 2).astype(np.uint8)
    if pixels.shape[2:] != (resolution, resolution):
        raise UserError(f"{where}: images of {width}×{height} do not come to {resolution}×"
                        f"{resolution} by halving; choose another resolution")
    return pixels


def _belongs(keys: list[str], split: str, where: Path) -> np.ndarray:
    """Which keys are in `split`, bool (N,): the same nine of ten on every machine, for ever."""
    if split == "val":
        raise UserError(f"{where}: is divided into train and test only; choose one or supply val")
    # The salt keeps this independent of splits that others made by hashing the same names.
    digests = (hashlib.sha256(b"mrcnf " + os.fsencode(key)).digest() for key in keys)
    return np.array([(int.from_bytes(d) % 10 == 0) == (split == "test") for d in digests], bool)


def _photos(split: str, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops (N, 1, resolution, resolution) of PyWavelets' camera, ascent and aero, and groups (N,).

    Each photograph, 512×512, is divided into 4×4 blocks of 128×128: blocks (row, column) (0,1),
    (1,3), (2,0), (3,2) are `test`, (0,3) and (3,0) `val`, the other ten `train`. Crops lie wholly
    in blocks of their split; those of `train` start every 8 pixels, the others do not overlap.
    """
    held = {(0, 1): "test", (1, 3): "test", (2, 0): "test", (3, 2): "test",
            (0, 3): "val", (3, 0): "val"}
    if resolution > 128:
        raise UserError(f"photos: crops have at most 128×128 pixels; {resolution} is too much")
    starts = range(0, 512 - resolution + 1, 8 if split == "train" else resolution)
    ends = (0, resolution - 1)
    corners = [
        (y, x) for y in starts for x in starts
        if all(held.get(((y + v) // 128, (x + u) // 128), "train") == split
               for v in ends for u in ends)
    ]
    photographs = np.stack([pywt.data.camera(), pywt.data.ascent(), pywt.data.aero()])
    crops = [photographs[:, y : y + resolution, x : x + resolution] for y, x in corners]
    pixels = np.array(crops, np.uint8).reshape(-1, 1, resolution, resolution)
    return pixels, np.tile(np.arange(len(photographs)), len(corners))


def _folder(path: Path, split: str, resolution: int | None, limit: int | None) -> np.ndarray:
    divided = any((path / s).is_dir() for s in SPLITS)
    top = path / split if divided else path
    if not top.is_dir():
        raise UserError(f"{top}: there is no such folder; check the path or make it")
    files = {p.relative_to(top).as_posix(): p for p in top.rglob("*") if p.is_file()}
    names = sorted(n for n in files if n.lower().endswith(SUFFIXES) and "/." not in f"/{n}")
    if not names:
        raise UserError(f"{top}: holds no image files (names ending in {' '.join(SUFFIXES)})")
    if not divided:
        names = [n for n, yes in zip(names, _belongs(names, split, path), strict=True) if yes]
    images: list[np.ndarray] = []
    for name in names[:limit]:
        image = read_image(files[name]).numpy()
        images.append(_central(image, resolution, files[name]) if resolution else image)
        if images[-1].shape[1:] != images[0].shape[1:]:
            pair = ((names[0], images[0]), (name, images[-1]))
            sizes = " but ".join(f"{n} is {i.shape[2]}×{i.shape[1]}" for n, i in pair)
            raise UserError(f"{top}: {sizes}; give a resolution to make them alike")
    depth = max((len(i) for i in images), default=1)
    return np.array([np.broadcast_to(i, (depth, *i.shape[1:])) for i in images], np.uint8)


def _central(image: np.ndarray, resolution: int, path: Path) -> np.ndarray:
    """The central square of (C, H, W), box-averaged to (C, resolution, resolution)."""
    _, height, width = image.shape
    if (side := min(height, width)) < resolution:
        raise UserError(f"{path}: {width}×{height} is smaller than the resolution {resolution}; "
                        "remove the file or choose a smaller resolution")
    y, x = (height - side) // 2, (width - side) // 2
    # In float32: Pillow would round bytes after each of its two passes, and each time upwards.
    square = image[:, y : y + side, x : x + side].astype(np.float32)
    size, box = (resolution, resolution), Image.Resampling.BOX
    small = [np.array(Image.fromarray(plane).resize(size, box)) for plane in square]
    return np.floor(np.stack(small) + 0.5).astype(np.uint8)


# Readers of published formats: from a path to uint8 (N, C, H, W)


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels, and the array `photo` (N,) if there is one; never unpickles."""
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


def _npz_split(path: Path, split: str) -> tuple[np.ndarray, np.ndarray | None]:
    divided = path.is_dir()
    pixels, photo = _npz(path / f"{split}.npz" if divided else path)
    source = np.arange(len(pixels)) if photo is None else photo
    keys, groups = np.unique(source, return_inverse=True)
    if not divided:
        chosen = _belongs([str(key) for key in keys], split, path)[groups]
        pixels, groups = pixels[chosen], groups[chosen]
    return pixels, None if photo is None else groups


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


def _cifar(path: Path) -> np.ndarray:
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


def _idx(path: Path) -> np.ndarray:
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


def _mat(path: Path) -> np.ndarray:
    """The array `X` (H, W, C, N), first index fastest, of a MATLAB 5 file."""
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


@dataclass(frozen=True)
class _Published:
    read: Callable[[Path], np.ndarray]
    shape: tuple[int, int, int]  # (C, H, W)
    folders: tuple[str, ...]  # below the root; downloaded files go to the first
    files: Mapping[str, tuple[str, ...]]  # by split; NAME.gz may also lie there as NAME
    url: str = ""  # {} stands for the file; "" means that there is no open one
    md5: Mapping[str, str] = field(default_factory=dict)  # by split, of what is at the URL
    remedy: str = ""


def _imagenet(size: int) -> _Published:
    train = tuple(f"train_data_batch_{i}.npz" for i in range(1, 11))
    files = {"train": train, "test": ("val_data.npz",), "val": ("val_data.npz",)}
    remedy = "an account at https://image-net.org gives access to the downsampled images (npz)"
    folders = (f"imagenet{size}", "")
    return _Published(lambda p: _npz(p)[0], (3, size, size), folders, files, remedy=remedy)


_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-{}-python.tar.gz"
PUBLISHED: Mapping[str, _Published] = {
    "cifar10": _Published(
        _cifar, (3, 32, 32), ("cifar-10-batches-py", ""),
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        _CIFAR.format(10), dict.fromkeys(SPLITS, "c58f30108f718f92721af3b95e74349a"),
    ),
    "cifar100": _Published(
        _cifar, (3, 32, 32), ("cifar-100-python", ""), {"train": ("train",), "test": ("test",)},
        _CIFAR.format(100), dict.fromkeys(SPLITS, "eb9058c3a382ffc7106e4002c42a8d85"),
    ),
    "svhn": _Published(
        _mat, (3, 32, 32), ("", "svhn"),
        {"train": ("train_32x32.mat",), "test": ("test_32x32.mat",)},
        "http://ufldl.stanford.edu/housenumbers/{}",
        {"train": "e26dedcc434d2e4c54c9b2d4a06d8373", "test": "eb5a983be6a315427106f1b164d9cef3"},
    ),
    "fashion-mnist": _Published(
        _idx, (1, 28, 28), ("fashion-mnist", "", "/usr/share/datasets/fashion-mnist"),
        {"train": ("train-images-idx3-ubyte.gz",), "test": ("t10k-images-idx3-ubyte.gz",)},
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{}",
        {"train": "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "test": "bef4ecab320f06d8554ea6380940ec79"},
        "apt-get install dataset-fashion-mnist, or",
    ),
    "imagenet32": _imagenet(32),
    "imagenet64": _imagenet(64),
}
NAMES = ("photos", *PUBLISHED, "folder:PATH", "npz:PATH")


def _published(
    name: str, split: str, root: Path, resolution: int | None, limit: int | None, download: bool
) -> np.ndarray:
    source, parts, count = PUBLISHED[name], [], 0
    if split not in source.files:
        raise UserError(f"{name} has no split '{split}'; choose {' or '.join(source.files)}")
    for file in source.files[split]:
        path, url = _find(source, file, root), source.url.format(file)
        if path is None and download and url:
            _download(url, source.md5[split], root, source.folders[0])
            path = _find(source, file, root)
        if path is None:
            places = ", ".join(str(root / folder) for folder in source.folders)
            fetch = f"get {url} or give --data.download true (needs pip install 'mrcnf[data]')"
            raise UserError(f"{name}: {file} was not found in {places}; {source.remedy} "
                            f"{fetch if url else ''}; --data.root DIR or MRCNF_DATA say where")
        part = source.read(path)
        if part.shape[1:] != source.shape:
            raise UserError(f"{path}: images are (C,H,W) = {part.shape[1:]}, not {source.shape}; "
                            f"replace it with {name}'s own file")
        parts.append(_reduce(part[: limit and limit - count], resolution, path))
        count += len(parts[-1])
        if count == limit:
            break
    return np.concatenate(parts)


def _find(source: _Published, file: str, root: Path) -> Path | None:
    spots = (root / f / n for f in source.folders for n in (file, file.removesuffix(".gz")))
    return next((spot for spot in spots if spot.is_file()), None)


def _download(url: str, md5: str, root: Path, folder: str) -> None:
    try:
        import pooch
    except ImportError as error:
        raise UserError("downloading needs pooch: pip install 'mrcnf[data]'") from error
    packed = url.endswith(".tar.gz")
    target = root if packed else root / folder
    try:
        file = url.rpartition("/")[2]
        got = pooch.retrieve(url, known_hash=f"md5:{md5}", fname=file, path=target)
        if packed:
            with tarfile.open(got) as archive:
                archive.extractall(root, filter="data")
    except Exception as error:  # network, disk and checksum have nothing narrower in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{url} could not be downloaded ({reason[:200]}); "
                        f"fetch it by other means into {target}") from error
