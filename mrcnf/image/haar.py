"""The unimodular Haar transform, and its integer form: an image becomes a coarser one and details.

A 2×2 patch ``x1 x2 / x3 x4`` becomes its mean and three scaled differences::

    coarse = (x1 + x2 + x3 + x4) / 4
    y1     = (x1 + x2 - x3 - x4) / c      rows differ       PyWavelets' cH · 2/c
    y2     = (x1 - x2 + x3 - x4) / c      columns differ    PyWavelets' cV · 2/c
    y3     = (x1 - x2 - x3 + x4) / c      diagonal          PyWavelets' cD · 2/c

with c = 2^(2/3), so that the determinant is 16 / (4·c³) = 1: densities pass between resolutions
without a correction (Voleti et al., arXiv 2106.08462, §3.1). `coarse` is PyWavelets' cA / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrcnf.errors import UserError

SCALE = 1.5874010519681994
"""The constant c = 2^(2/3) that makes the transform unimodular, which all machines are to have to
the last digit."""


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split images into details and coarser images.

    Args:
        x: (N, C, H, W) with even H and W, floating; integers are computed in the default
            floating type (`lift` keeps them integers).

    Returns:
        detail: (N, 3C, H/2, W/2), band-major: all channels of y1, then of y2, then of y3.
        coarse: (N, C, H/2, W/2), the 2×2 means.

    Raises:
        UserError: if x does not have four dimensions, or H or W is odd.

    >>> detail, coarse = split(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]))
    >>> coarse.item(), [round(v * SCALE, 3) for v in detail.flatten().tolist()]
    (3.0, [-6.0, -4.0, 2.0])
    """
    x1, x2, x3, x4 = patches(_floating(x))
    top, bottom = x1 + x2, x3 + x4
    top_step, bottom_step = x1 - x2, x3 - x4
    bands = (top - bottom, top_step + bottom_step, top_step - bottom_step)
    return torch.cat(bands, dim=1) / SCALE, (top + bottom) / 4


def merge(detail: Tensor, coarse: Tensor) -> Tensor:
    """The inverse of `split`: (N, 3C, h, w) and (N, C, h, w) → (N, C, 2h, 2w).

    Raises:
        UserError: if the shapes do not belong together.
    """
    _check_pair("haar.merge", detail, coarse)
    rows, columns, diagonal = (detail * (SCALE / 4)).chunk(3, dim=1)
    top, bottom = coarse + rows, coarse - rows
    top_step, bottom_step = columns + diagonal, columns - diagonal
    return interleave(
        top + top_step, top - top_step, bottom + bottom_step, bottom - bottom_step
    )


def means(x: Tensor, times: int = 1) -> Tensor:
    """The coarse image after `times` splits: means over 2^times × 2^times pixels.

    Sums in the same order as `split`, so the result is the pyramid's to the last bit.
    """
    x = _floating(x)
    for _ in range(times):
        x1, x2, x3, x4 = patches(x)
        x = ((x1 + x2) + (x3 + x4)) / 4
    return x


def lift(x: Tensor) -> tuple[Tensor, Tensor]:
    """The integer form (S-transform): integers to integers, one to one, determinant 1.

    Along rows, then columns, a pair (a, b) becomes its floored mean and its difference
    (Said & Pearlman 1996): mean = b + ⌊(a - b)/2⌋.

    Args:
        x: (N, C, H, W) signed integers, H and W even (uint8 must be widened by the caller).

    Returns:
        detail: (N, 3C, H/2, W/2), approximately y1·c/2, y2·c/2 and y3·c in `split`'s terms.
        coarse: (N, C, H/2, W/2), within one of the mean; 8-bit images stay 8-bit images.
    """
    if x.is_floating_point() or not x.is_signed():
        raise UserError(
            f"haar.lift needs signed integers, got {x.dtype}; use images.to(torch.int32)"
        )
    x1, x2, x3, x4 = patches(x)
    top, top_step = _lift_pair(x1, x2)
    bottom, bottom_step = _lift_pair(x3, x4)
    coarse, rows = _lift_pair(top, bottom)
    columns, diagonal = _lift_pair(top_step, bottom_step)
    return torch.cat((rows, columns, diagonal), dim=1), coarse


def unlift(detail: Tensor, coarse: Tensor) -> Tensor:
    """The inverse of `lift`, exact."""
    _check_pair("haar.unlift", detail, coarse)
    rows, columns, diagonal = detail.chunk(3, dim=1)
    top, bottom = _unlift_pair(coarse, rows)
    top_step, bottom_step = _unlift_pair(columns, diagonal)
    return interleave(*_unlift_pair(top, top_step), *_unlift_pair(bottom, bottom_step))


def _lift_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    difference = a - b
    return b + (difference >> 1), difference


def _unlift_pair(mean: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    b = mean - (difference >> 1)
    return b + difference, b


def _floating(x: Tensor) -> Tensor:
    """Sums of four bytes overflow a byte."""
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _shape(x: Tensor) -> torch.Size:
    if x.dim() != 4:
        raise UserError(f"images must have shape (N, C, H, W), got {tuple(x.shape)}")
    return x.shape


def _check_pair(name: str, detail: Tensor, coarse: Tensor) -> None:
    n, c, h, w = _shape(coarse)
    if tuple(detail.shape) != (n, 3 * c, h, w):
        raise UserError(
            f"{name}: details of shape {tuple(detail.shape)} do not belong to a coarse image of "
            f"shape {tuple(coarse.shape)}; expected {(n, 3 * c, h, w)}"
        )


def patches(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top-left, top-right, bottom-left and bottom-right pixels of every 2×2 patch."""
    _, _, h, w = _shape(x)
    if h % 2 or w % 2 or not h or not w:
        raise UserError(
            f"a {h}×{w} image cannot be halved: height and width must be even; crop or pad it"
        )
    return x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]


def interleave(x1: Tensor, x2: Tensor, x3: Tensor, x4: Tensor) -> Tensor:
    """The inverse of `patches`."""
    top, bottom = torch.stack((x1, x2), dim=-1), torch.stack((x3, x4), dim=-1)
    n, c, h, w = x1.shape
    return torch.stack((top, bottom), dim=-3).reshape(n, c, 2 * h, 2 * w)
