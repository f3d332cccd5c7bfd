"""Many images as one: a grid of them, and pixels large enough to see."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BACKGROUND = 255


def grid(images: Tensor, columns: int = 0, gap: int = 2, zoom: int = 1) -> Tensor:
    """Tile uint8 (N, C, H, W) into one image (C, ·, ·), row by row on white.

    Args:
        columns: images per row; 0 makes the grid as square as possible.
        gap: pixels between images, after zooming.
        zoom: show each pixel as a square of this side.
    """
    images = enlarge(images.cpu(), zoom)
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), BACKGROUND,
                        dtype=torch.uint8)  # fmt: skip
    for i, image in enumerate(images):
        top = gap + (i // columns) * (h + gap)
        left = gap + (i % columns) * (w + gap)
        canvas[:, top : top + h, left : left + w] = image
    return canvas


def enlarge(images: Tensor, zoom: int) -> Tensor:
    """Repeat every pixel of (…, H, W) zoom × zoom times."""
    return images.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)
