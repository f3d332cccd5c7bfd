"""What classical lossless image formats take: PNG and WebP."""

from __future__ import annotations

import io

from PIL import Image
from torch import Tensor

from mrcnf.image.grid import grid


def classical_bits(images: Tensor, form: str, *, mosaic: bool) -> float:
    """Bits per dimension of lossless image files, each file's header included.

    Args:
        images: uint8 (N, C, H, W), C being 1 or 3, on the CPU.
        form: PNG, or WEBP in its lossless form; both at their hardest effort.
        mosaic: one file of all images side by side instead of a file for each.
    """
    pictures = [grid(images, gap=0)] if mosaic else list(images)
    total = 0
    for image in pictures:
        array = image.permute(1, 2, 0).squeeze(2).numpy()
        buffer = io.BytesIO()
        options = {"lossless": True, "quality": 100, "method": 6} if form == "WEBP" else {}
        Image.fromarray(array).save(buffer, form, optimize=True, **options)
        total += 8 * buffer.tell()
    return total / images.numel()
