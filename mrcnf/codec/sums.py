"""Sums that no library can make different by adding up in an order of its own.

Sums of few terms are added in halves, one IEEE addition after another. Convolutions, which
libraries must be left to do, are of whole numbers so small that double precision adds them exactly,
in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrcnf.codec.ans import CodingError
from mrcnf.codec.elementary import exp, power_of_two

_DIGITS = 53
"""Binary digits of double precision: whole numbers up to 2^53 are exact, and sums up to there."""
WEIGHT_BITS = 16
"""Weights are whole numbers up to 2^16 of a unit that each output has for itself."""
RANGE_BITS = 10
"""What convolutions are given is clamped to ±2^10."""
_FINEST_BITS = 32
"""Of the fraction of what they are given."""
_HUGE = 800
"""Exponents that keep all of that far from where double precision ends."""
_LARGEST = 1 << 22
"""Products that are held at a time."""


def total(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    """The sum over some dimensions (or all): the first half of the terms and the second are added,
    until one is left."""
    every = range(x.dim())
    summed = sorted(d % x.dim() for d in dims) if dims else list(every)
    kept = [d for d in every if d not in summed]
    shape = [1 if d in summed else x.shape[d] for d in every]
    found = _halved(x.permute(*summed, *kept).flatten(0, len(summed) - 1) if summed else x[None])
    return found.reshape(shape) if keepdim else found


def mean(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    """The mean over some dimensions, as `total`."""
    found = total(x, dims, keepdim)
    return found / (x.numel() // max(1, found.numel()))


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product of (…, N, K) and (…, K, M)."""
    terms = math.prod(b.shape)
    return torch.cat(
        [
            _halved(rows.movedim(-1, 0)[..., None] * b.movedim(-2, 0)[..., None, :])
            for rows in a.split(max(1, _LARGEST // max(1, terms)), dim=-2)
        ],
        dim=-2,
    )


def pooled(x: Tensor, size: Sequence[int]) -> Tensor:
    """Means over size[0] × size[1] positions of (N, C, H, W)."""
    height, width = size[0], size[-1]
    rows = x.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
    return mean(rows, (-3, -1))


def softmax(x: Tensor, dim: int) -> Tensor:
    """e^x over the sum of it."""
    powers = exp(x - x.amax(dim, keepdim=True))
    return powers / total(powers, (dim,), keepdim=True)


def _halved(terms: Tensor) -> Tensor:
    """The sum over the first dimension."""
    if not len(terms):
        return terms.new_zeros(terms.shape[1:])
    own = False
    while (count := len(terms)) > 1:
        half = (count + 1) // 2
        if own:
            terms[: count - half].add_(terms[half:])
            terms = terms[:half]
        else:
            pairs = terms[: count - half] + terms[half:]
            terms = torch.cat((pairs, terms[count - half : half])) if count % 2 else pairs
            own = True
    return terms[0]


class Convolutions:
    """Convolutions whose sums are exact.

    A weight is rounded to a whole number w ≤ 2^16 of a unit, and what comes in clamped and rounded
    to a whole number x of 2^-a. If Σ|w|, the largest of any output, times the largest x is at
    most 2^53, so is every sum of some of the products: double precision holds it, and it is the
    same whatever was added first. That decides on a.

    Args:
        model: whose weights stay as they are, so that they are rounded but once.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        kept = [] if model is None else [*model.parameters(), *model.buffers()]
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in kept}
        self._rounded: dict[tuple[object, ...], tuple[Tensor, int]] = {}

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        """As torch.conv2d.

        Raises:
            CodingError: the input is not a number somewhere, or weights are not finite.
        """
        whole, digits = self._of(weight)
        limit = 2.0 ** (digits + RANGE_BITS)
        x = (x * 2.0**digits).clamp_(-limit, limit).round_()
        if math.isnan(float(x.sum())):
            raise CodingError("a network's values are not finite")
        found = convolve(x, whole, stride, padding, dilation, groups)
        return found if bias is None else found + bias[:, None, None]

    def _of(self, weight: Tensor) -> tuple[Tensor, int]:
        """`rounded` weights, and a."""
        if weight.untyped_storage().data_ptr() not in self._kept:
            return rounded(weight)
        key = (weight.data_ptr(), weight.device, *weight.shape, *weight.stride())
        if key not in self._rounded:
            self._rounded[key] = rounded(weight)
        return self._rounded[key]


def rounded(weight: Tensor) -> tuple[Tensor, int]:
    """Weights (O, I, H, W) in units of 2^-a of what they are applied to, and a.

    Raises:
        CodingError: they are not finite.
    """
    _, exponent = torch.frexp(weight.abs().amax((1, 2, 3), keepdim=True))
    if not bool(weight.isfinite().all()) or int(exponent.max()) > _HUGE:
        raise CodingError("a network's weights are not finite")
    unit = power_of_two(exponent.clamp_min(-_HUGE) - WEIGHT_BITS)
    whole = (weight / unit).round()
    # Whole numbers below 2^53, of which any order makes the same sum.
    largest = max(1, int(whole.abs().sum((1, 2, 3)).max()))
    digits = min(_FINEST_BITS, ((1 << _DIGITS) // largest).bit_length() - 1 - RANGE_BITS)
    assert largest << (digits + RANGE_BITS) <= 1 << _DIGITS
    whole = whole * (unit * 2.0**-digits)
    return whole.contiguous(memory_format=torch.channels_last), digits


def convolve(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution by products and sums alone, in any order."""
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    # Elsewhere libraries may choose an algorithm that transforms the numbers first.
    columns = F.unfold(x, weight.shape[2:], dilation, padding, stride)  # type: ignore[arg-type]
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1)
        // stride[i] + 1
        for i in range(2)
    )  # fmt: skip
    found = weight.reshape(groups, -1, weight[0].numel()) @ columns.unflatten(1, (groups, -1))
    return found.flatten(1, 2).unflatten(2, (height, width))
