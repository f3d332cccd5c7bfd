"""The two ways from an image to a coarser one: exact means, or integers all the way down.

Both split dequantised images x = (X + u)/2^b into details and a coarser image and keep
volumes, so that densities pass between resolutions unchanged:

exact
    The unimodular Haar transform of x, noise included (`haar.split`). Every level is
    conditioned on the exact coarse image of that noise.
integer
    The S-transform of the integers X (`haar.lift`), u dealt out again to what it gives: three
    pixels' noise to the details, one's to the coarse image. Every level is a model of its own,
    P(detail integers | coarse integers), and is conditioned on 8-bit coarse images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrcnf.image import haar

KINDS = ("exact", "integer")


def split(kind: str, x: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) to details (N, 3C, H/2, W/2) and coarser images (N, C, H/2, W/2)."""
    if kind == "exact":
        return haar.split(x)
    integers, noise = _cells(x, nbits)
    detail, coarse = haar.lift(integers)
    first, *others = haar.patches(noise)
    return (detail + torch.cat(others, 1)) / 2**nbits, (coarse + first) / 2**nbits


def merge(kind: str, detail: Tensor, coarse: Tensor, nbits: int) -> Tensor:
    """The inverse of `split`."""
    if kind == "exact":
        return haar.merge(detail, coarse)
    (details, others), (means, first) = _cells(detail, nbits), _cells(coarse, nbits)
    noise = haar.interleave(first, *others.chunk(3, dim=1))
    return (haar.unlift(details, means) + noise) / 2**nbits


def reduce(kind: str, x: Tensor, nbits: int, times: int) -> Tensor:
    """The coarse image after `times` splits."""
    if kind == "exact":
        return haar.reduce(x, times)
    for _ in range(times):
        _, x = split(kind, x, nbits)
    return x


def contain(kind: str, x: Tensor, coarse: Tensor, nbits: int) -> Tensor:
    """Shrink the details of images x until every pixel is in range; the coarse image stays.

    Exact means stay what they are, and so do the integers that the S-transform gives.
    """
    if kind == "exact":
        return haar.contain(x, coarse)
    detail, _ = split(kind, x, nbits)
    (details, noise), (means, _) = _cells(detail, nbits), _cells(coarse, nbits)
    kept = torch.zeros_like(details)
    undecided = torch.ones_like(means, dtype=torch.bool)
    for sixteenth in range(16, 0, -1):  # at 0 all four pixels are the mean
        shrunk = torch.div(details * sixteenth, 16, rounding_mode="trunc")
        pixels = torch.stack(haar.patches(haar.unlift(shrunk, means)))
        fits = undecided & ((pixels >= 0) & (pixels < 2**nbits)).all(0)
        kept = torch.where(fits.repeat(1, 3, 1, 1), shrunk, kept)
        undecided &= ~fits
    return merge(kind, (kept + noise) / 2**nbits, coarse, nbits)


def condition(kind: str, coarse: Tensor, nbits: int) -> Tensor:
    """What the finer level is given of a coarse image: all of it, or its integers."""
    return coarse if kind == "exact" else ((coarse * 2**nbits).floor() + 0.5) / 2**nbits


def _cells(x: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
    """Which cell of the integers' lattice, int32, and where in it, in [0, 1)."""
    cells = x * 2**nbits
    integers = cells.floor()
    # A shade below an integer rounds up to 1 from it; at this end merging stays within the cell.
    end = 1 - torch.finfo(x.dtype).eps * 2**nbits
    return integers.to(torch.int32), (cells - integers).clamp(max=end)
