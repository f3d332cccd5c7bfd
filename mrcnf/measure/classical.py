"""What classical lossless image formats take: PNG, WebP, JPEG-LS, JPEG XL."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mrcnf.errors import UserError
from mrcnf.image.grid import grid


@dataclass(frozen=True)
class Format:
    """A lossless format, at the effort that its name says or the one that gives the least."""

    encode: Callable[[np.ndarray], bytes]
    """From uint8 (H, W) or (H, W, 3) to a file."""
    decode: Callable[[bytes], np.ndarray]
    extra: bool
    """Whether it needs the extra `compare`."""


@dataclass(frozen=True)
class Size:
    """What one format made of images."""

    name: str
    mosaic: bool
    """One file of all images side by side instead of a file for each."""
    bits_per_dim: float
    """Of the files, headers included."""
    encoding: float
    """Megabytes (10^6) of pixels a second, on one thread."""
    decoding: float


def available() -> tuple[list[str], str]:
    """The names of the formats that this machine can write, and why others are left out, or ""."""
    try:
        import imagecodecs  # noqa: F401, an extra, and here alone
    except ImportError:
        extras = [name for name, form in FORMATS.items() if form.extra]
        why = "they need imagecodecs: pip install 'mrcnf[compare]'"
        left = [name for name in FORMATS if name not in extras]
        return left, f"{', '.join(extras)} are left out, as {why}"
    return list(FORMATS), ""


def classical_sizes(images: Tensor, names: Sequence[str] = ()) -> list[Size]:
    """Sizes and speeds of each format, image by image and in one mosaic.

    Every file is decoded again and compared with what went into it.

    Args:
        images: uint8 (N, C, H, W), C being 1 or 3, on the CPU.
        names: of formats, keys of `FORMATS`; all that are `available` by default.

    Raises:
        UserError: a format needs an extra that is not installed.
        RuntimeError: a file does not give its image back.
    """
    return [
        _size(name, images, mosaic) for name in names or available()[0] for mosaic in (False, True)
    ]


def bits_of_files(images: Tensor, name: str, *, progress: bool = False) -> Tensor:
    """Bits per dimension of a file of one format for each image, (N,) in double precision.

    Args:
        images: uint8 (N, C, H, W), C being 1 or 3, on the CPU.
        name: of a format, a key of `FORMATS`.
        progress: show a bar on stderr.

    Raises:
        UserError: the format needs an extra that is not installed.
    """
    encode = FORMATS[name].encode
    bar = tqdm(images, desc=name, unit="image", disable=not progress)
    sizes = [len(encode(_array(picture))) for picture in bar]
    return 8 * torch.tensor(sizes, dtype=torch.float64) / images[0].numel()


def _array(picture: Tensor) -> np.ndarray:
    return np.ascontiguousarray(picture.permute(1, 2, 0).squeeze(2).numpy())


def _size(name: str, images: Tensor, mosaic: bool) -> Size:
    pictures = [grid(images, gap=0)] if mosaic else list(images)
    arrays = [_array(picture) for picture in pictures]
    form = FORMATS[name]
    started = time.perf_counter()
    coded = [form.encode(array) for array in arrays]
    between = time.perf_counter()
    decoded = [form.decode(data) for data in coded]
    ended = time.perf_counter()
    for array, again in zip(arrays, decoded, strict=True):
        if not _same(array, again):
            raise RuntimeError(f"{name} does not give an image of {array.shape} back")
    values = images.numel()
    return Size(
        name, mosaic, 8 * sum(map(len, coded)) / values,
        values / 1e6 / (between - started), values / 1e6 / (ended - between),
    )  # fmt: skip


def _same(array: np.ndarray, again: np.ndarray) -> bool:
    if again.ndim > array.ndim:  # WebP has no grey: it comes back as RGB of equal channels
        array = np.broadcast_to(array[..., None], again.shape)
    return np.array_equal(array, again)


def _by_pillow(form: str, *efforts: dict[str, Any]) -> Format:
    """The smallest of the files of several efforts."""

    def encode(array: np.ndarray) -> bytes:
        return min((_saved(array, form, effort) for effort in efforts), key=len)

    def decode(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data), formats=(form,)) as image:
            return np.asarray(image)

    return Format(encode, decode, extra=False)


def _saved(array: np.ndarray, form: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def _by_imagecodecs(form: str, **options: Any) -> Format:
    def call(what: str, data: Any, **options: Any) -> Any:
        try:
            import imagecodecs
        except ImportError:
            raise UserError(f"{form} needs imagecodecs: pip install 'mrcnf[compare]'") from None
        return getattr(imagecodecs, f"{form}_{what}")(data, **options)

    def encode(array: np.ndarray) -> bytes:
        # Room for noise, which grows: by itself imagecodecs gives JPEG-LS too little of it.
        return bytes(call("encode", array, out=2 * array.nbytes + 4096, **options))

    return Format(encode, functools.partial(call, "decode"), extra=True)


FORMATS: dict[str, Format] = {
    "PNG": _by_pillow("PNG", {"optimize": True}),
    "lossless WebP": _by_pillow(
        "WEBP",
        {"lossless": True, "quality": 100, "method": 6},
        {"lossless": True, "quality": 75, "method": 4},  # which does better on small images
    ),
    "JPEG-LS": _by_imagecodecs("jpegls"),
    "JPEG XL, effort 7": _by_imagecodecs("jpegxl", lossless=True, effort=7, numthreads=1),
    "JPEG XL, effort 9": _by_imagecodecs("jpegxl", lossless=True, effort=9, numthreads=1),
}
"""By name, the simplest first."""
