"""Smaller 8-bit images: the one place where their pixels are averaged and rounded."""

from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mrcnf.errors import UserError

Pixels = TypeVar("Pixels", torch.Tensor, np.ndarray)


def average(images: Pixels, height: int, width: int) -> Pixels:
    """Means over boxes of pixels, rounded half up once: uint8 (N, C, H, W) → (N, C, height, width).

    A tensor gives a tensor on the same device, an array gives an array; dimensions before the last
    two may be any. A box holds the whole pixels whose centres lie in it, a centre on the border
    belonging to the box above or to the left: H/height × W/width pixels where that is whole. Exact:
    (sum + n//2) // n in integers. Pillow's BOX filter has the same boxes, but its floating-point
    borders leave to chance where a pixel belongs whose centre they meet.

    Raises UserError for another type or shape, and for a size of nought or larger than the images'.

    >>> average(torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8), 1, 1).item()  # of 2.5
    3
    """
    if isinstance(images, torch.Tensor):
        means = average(images.detach().cpu().numpy(), height, width)
        return torch.from_numpy(means).to(images.device)
    if images.dtype != np.uint8 or images.ndim < 2:
        raise UserError(f"averaging takes uint8 images (N, C, H, W), not {images.dtype} "
                        f"{images.shape}; convert them first")
    tall, wide = images.shape[-2:]
    if not (1 <= height <= tall and 1 <= width <= wide):
        raise UserError(f"images of {wide}×{tall} cannot be averaged to {width}×{height}; "
                        f"choose a size from 1×1 to {wide}×{tall}")
    if tall % height == 0 and wide % width == 0:
        down, across = tall // height, wide // width
        count: Any = down * across
        kind = _holding(count)
        # In this order, and not as one sum over two axes, which takes several times as long.
        rows = reduce(np.add, (images[..., i::down, :].astype(kind) for i in range(down)))
        means = reduce(np.add, (rows[..., i::across] for i in range(across)))
    else:  # boxes of several sizes; many times slower where they are small
        upper, left = _edges(tall, height), _edges(wide, width)
        sizes = np.outer(np.diff(upper), np.diff(left))
        kind = _holding(int(sizes.max()))
        count = sizes.astype(kind)
        rows = np.add.reduceat(images, upper[:-1], axis=-2, dtype=kind)
        means = np.add.reduceat(rows, left[:-1], axis=-1, dtype=kind)
    means += count // 2
    means //= count
    return means.astype(np.uint8)


def _holding(count: int) -> np.dtype:
    """The smallest integer type for the sum of `count` bytes and half of `count`."""
    # Data sets are large: sums of int64 would be eight times the images.
    return np.min_scalar_type(255 * count + count // 2)


def _edges(pixels: int, boxes: int) -> np.ndarray:
    """Where each of the boxes along one axis begins, and where the last ends: int (boxes + 1,)."""
    # ⌊o·pixels/boxes + 1/2⌋: the first pixel whose centre lies past the border.
    return (2 * pixels * np.arange(boxes + 1) + boxes) // (2 * boxes)


def halve(pixels: np.ndarray, resolution: int | None, where: Path) -> np.ndarray:
    """Square images that are 2^k times as large as `resolution`, averaged to it; None keeps them.

    uint8 (N, C, H, H) → (N, C, resolution, resolution). 28×28 images get borders of zeros to 32×32
    first where `resolution` divides 32.

    Raises UserError, naming `where` they lie, for images of another size.
    """
    height, width = pixels.shape[2:]
    if resolution is None:
        return pixels
    if (height, width) == (28, 28) and 32 % resolution == 0:
        pixels = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2)))
    side, other = pixels.shape[2:]
    factor, rest = divmod(side, resolution)
    if side != other or rest or factor.bit_count() != 1:  # one bit: a power of two
        raise UserError(f"{where}: images of {width}×{height} do not come to {resolution}×"
                        f"{resolution} by halving; choose another resolution")
    return average(pixels, resolution, resolution)


def central(image: np.ndarray, resolution: int, path: Path) -> np.ndarray:
    """The central square of a photograph, averaged: uint8 (C, H, W) → (C, resolution, resolution).

    Raises UserError, naming its `path`, if the photograph is smaller than that.
    """
    _, height, width = image.shape
    if (side := min(height, width)) < resolution:
        raise UserError(f"{path}: {width}×{height} is smaller than the resolution {resolution}; "
                        "remove the file or choose a smaller resolution")
    y, x = (height - side) // 2, (width - side) // 2
    return average(image[:, y : y + side, x : x + side], resolution, resolution)
