"""Noise in the cells of the integers, on the lattice: popped, and given back by the decoder.

Uniform noise is a sub-cell from the stack, Gaussian noise one by a table. Learned noise bends
uniform noise, element by element: a step of local bits-back as in `steps`, with one thing of its
own. The place of an element in its interval goes round in a circle, whose ends the bend leaves
where they are: noise that would lead out at one end comes in at the other, and is found there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrcnf.codec.ans import CodingError, Stack
from mrcnf.codec.tables import LOG_2, OCTAVE
from mrcnf.image import haar
from mrcnf.image.learned_noise import PAIRS, bend, unbend
from mrcnf.image.noise import GAUSSIAN_STD

_SIGMA = 5 * OCTAVE
"""Index of the noise that a bend is coded with, 2^5 sub-cells: it is but one step."""
_LEAST, _MOST = OCTAVE, _SIGMA + 2 * OCTAVE
"""Indices that the noise is kept between when the bend stretches it."""
_SMALLEST = 20 * 2 ** (_MOST // OCTAVE)
"""Shorter intervals are left as they are: noise could go round in them."""


def pop(stack: Stack, kind: str, shape: tuple[int, ...], bits: int) -> Tensor:
    """Sub-cells below 2^bits, int64, of a kind of noise (`noise.NOISES`)."""
    if kind == "gaussian":
        return torch.from_numpy(stack.pop_truncated(shape, round(1 / GAUSSIAN_STD), bits))
    return torch.from_numpy(stack.pop_uniform(shape, bits))


def push(stack: Stack, kind: str, noise: Tensor, bits: int) -> None:
    """Give back what `pop` gave."""
    if kind == "gaussian":
        stack.push_truncated(noise.numpy(), round(1 / GAUSSIAN_STD), bits)
    else:
        stack.push_uniform(noise.numpy(), bits)


class Bends:
    """Learned noise in sub-cells.

    Args:
        shift, log_slope: of `LearnedNoise.bends`, for the integers at hand.
        pairs: whether the noise of pixels is bent in pairs, whose sums are kept to the last
            unit, and with them the coarser image of `lifting.sums`.
        bits: of the sub-cells.
    """

    def __init__(self, shift: Tensor, log_slope: Tensor, pairs: bool, bits: int) -> None:
        self.shift, self.log_slope, self.pairs = shift.double(), log_slope.double(), pairs
        self.cell = 1 << bits

    def apply(self, stack: Stack, noise: Tensor, key: tuple[int, ...]) -> Tensor:
        """Uniform noise (sub-cells, int64) bent, by way of the stack."""
        if not self.pairs:
            size = torch.full_like(noise, self.cell)
            return _apply(stack, noise, size, self.shift, self.log_slope, key)
        corners = list(haar.patches(noise))
        for number, (one, other, shift, log_slope) in enumerate(self._passes()):
            both, low, size = self._interval(corners[one], corners[other])
            place = corners[one] - low
            corners[one] = low + _apply(stack, place, size, shift, log_slope, (*key, number))
            corners[other] = both - corners[one]
        return haar.interleave(*corners)

    def undo(self, stack: Stack, noise: Tensor, key: tuple[int, ...]) -> Tensor:
        """The inverse of `apply`, which gives the stack back what that popped."""
        if not self.pairs:
            size = torch.full_like(noise, self.cell)
            return _undo(stack, noise, size, self.shift, self.log_slope, key)
        corners = list(haar.patches(noise))
        for number, (one, other, shift, log_slope) in reversed(list(enumerate(self._passes()))):
            both, low, size = self._interval(corners[one], corners[other])
            place = corners[one] - low
            corners[one] = low + _undo(stack, place, size, shift, log_slope, (*key, number))
            corners[other] = both - corners[one]
        return haar.interleave(*corners)

    def _passes(self) -> list[tuple[int, int, Tensor, Tensor]]:
        count = len(PAIRS)
        parts = zip(PAIRS, self.shift.chunk(count, 1), self.log_slope.chunk(count, 1), strict=True)
        return [(one, other, shift, slope) for (one, other), shift, slope in parts]

    def _interval(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of two sub-cells, the least that the first can be, and its number of values."""
        both = one + other
        low = (both - self.cell + 1).clamp_min(0)
        return both, low, torch.minimum(both, 2 * self.cell - 2 - both) + 1


def _apply(
    stack: Stack, place: Tensor, size: Tensor, shift: Tensor, slope: Tensor, key: tuple[int, ...]
) -> Tensor:
    """Places from 0 to size - 1, bent."""
    bent = size >= _SMALLEST
    x, n, a, b = place[bent], size[bent], shift[bent], slope[bent]
    scale, reached = _ahead(x, n, a, b)
    z = (reached + torch.from_numpy(stack.pop_noise(scale.numpy(), key))) % n
    scale, origin = _behind(z, n, a, b)
    stack.push_normal(_around(x - origin, n).numpy(), scale.numpy())
    return place.masked_scatter(bent, z)


def _undo(
    stack: Stack, place: Tensor, size: Tensor, shift: Tensor, slope: Tensor, key: tuple[int, ...]
) -> Tensor:
    bent = size >= _SMALLEST
    z, n, a, b = place[bent], size[bent], shift[bent], slope[bent]
    scale, origin = _behind(z, n, a, b)
    x = (origin + torch.from_numpy(stack.pop_normal(tuple(z.shape), scale.numpy()))) % n
    scale, reached = _ahead(x, n, a, b)
    stack.push_noise(_around(z - reached, n).numpy(), scale.numpy(), key)
    return place.masked_scatter(bent, x)


def _ahead(x: Tensor, n: Tensor, shift: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The sub-cells that places are bent to, and the index of σ·√s of noise there."""
    place, log_rise = bend((x + 0.5) / n, shift, slope)
    return _index(log_rise / 2), _cell(place, n)


def _behind(z: Tensor, n: Tensor, shift: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The sub-cells that places come from, and the index of σ/√s of noise there."""
    place = unbend((z + 0.5) / n, shift, slope)
    _, log_rise = bend(place, shift, slope)
    return _index(-log_rise / 2), _cell(place, n)


def _index(log_scale: Tensor) -> Tensor:
    index = _SIGMA + (OCTAVE / LOG_2 * log_scale.nan_to_num()).round()
    return index.clamp(_LEAST, _MOST).long()


def _cell(place: Tensor, n: Tensor) -> Tensor:
    if not bool(place.isfinite().all()):
        raise CodingError("the learned noise is not finite")
    return torch.minimum((place * n).floor().long().clamp_min(0), n - 1)


def _around(difference: Tensor, n: Tensor) -> Tensor:
    """The way round a circle of n places, the shorter one."""
    half = n // 2
    return (difference + half) % n - half
