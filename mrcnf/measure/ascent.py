"""Projected gradient ascent within a ball around images, for attacks and for training on them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

STRIDE = 1.0
"""The first step, in ε, unless one is given: from corner to corner, where many bits are."""

Slope = Callable[[Tensor], Tensor]
"""From uint8 images (N, C, H, W) to the gradient of what is to grow by their pixels, so shaped."""


def ascend(
    images: Tensor,
    slope: Slope,
    *,
    epsilon: int,
    steps: int,
    step_size: float,
    generator: torch.Generator | None = None,
    scatter: bool = False,
) -> Tensor:
    """Projected ascent by the signs of a gradient, on the lattice of integers.

    Where it is, is kept in fractions of grey levels; gradients are taken, and the end is, at the
    nearest integers, which both the ball and the range of pixels contain. The steps fall to zero
    along half a cosine.

    Args:
        images: uint8 (N, C, H, W).
        slope: of what is to grow.
        epsilon: the largest change of a pixel.
        step_size: the first step, in grey levels.
        generator: on the device of the images.
        scatter: start anywhere in the ball instead of at the images.

    Returns:
        uint8 (N, C, H, W).
    """
    middle = images.float()
    low, high = (middle - epsilon).clamp_min(0), (middle + epsilon).clamp_max(255)
    now = middle
    if scatter:
        place = torch.rand(images.shape, generator=generator, device=images.device)
        now = low + (high - low) * place
    for step in range(steps):
        gradient = slope(_nearest(now)).nan_to_num(0.0)
        stride = step_size * (1 + math.cos(math.pi * step / steps)) / 2
        now = (now + stride * gradient.sign()).clamp(low, high)
    return _nearest(now)


def _nearest(pixels: Tensor) -> Tensor:
    return pixels.round().to(torch.uint8)
