"""Noise in the cells of the integers, on the lattice: popped, and given back by the decoder.

Uniform noise is a sub-cell from the stack, Gaussian noise one by a table. Learned noise bends
uniform noise, element by element: a step of local bits-back as in `steps`, with one thing of its
own. The place of an element in its interval goes round in a circle, whose ends the bend leaves
where they are: noise that would lead out at one end comes in at the other, and is found there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mrcnf.codec.ans import CodingError, Stack
from mrcnf.codec.tables import LOG_2, OCTAVE
from mrcnf.image.learned_noise import Bends, Corners, bend, unbend
from mrcnf.image.noise import GAUSSIAN_STD

_SIGMA = 5 * OCTAVE
"""Index of the noise that a bend is coded with, 2^5 sub-cells: it is but one step."""
_LEAST, _MOST = OCTAVE, _SIGMA + 2 * OCTAVE
"""Indices that the noise is kept between when the bend stretches it."""
_SMALLEST = 20 * 2 ** (_MOST // OCTAVE)
"""Shorter intervals are left as they are: noise could go round in them."""


_Move = Callable[[Stack, Tensor, Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]


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


class BentNoise:
    """Learned noise in sub-cells.

    Args:
        bends: of `LearnedNoise.bends`, for the integers at hand.
        pairs: whether the noise of pixels is bent in pairs, whose sums are kept to the last
            unit, and with them the coarser image of `lifting.sums`.
        bits: of the sub-cells.
    """

    def __init__(self, bends: Bends, pairs: bool, bits: int) -> None:
        self.bends, self.pairs, self.cell = bends.to(torch.float64), pairs, 1 << bits

    def apply(self, stack: Stack, noise: Tensor, key: tuple[int, ...]) -> Tensor:
        """Uniform noise (sub-cells, int64) bent, by way of the stack."""
        return self._go(stack, noise, key, _apply, 1)

    def undo(self, stack: Stack, noise: Tensor, key: tuple[int, ...]) -> Tensor:
        """The inverse of `apply`, which gives the stack back what that popped."""
        return self._go(stack, noise, key, _undo, -1)

    def _go(
        self, stack: Stack, noise: Tensor, key: tuple[int, ...], move: _Move, order: int
    ) -> Tensor:
        if not self.pairs:
            size = torch.full_like(noise, self.cell)
            return move(stack, noise, size, self.bends.shift, self.bends.log_slope, key)
        corners = Corners(noise, bool(self.bends.links), self.cell, (self.cell - 1) / 2)
        for number, step in list(enumerate(corners.passes()))[::order]:
            one, other = corners.pair(step)
            shift, slope = self.bends.of(corners, step)
            both, low, size = self._interval(one, other)
            one = low + move(stack, one - low, size, shift, slope, (*key, number))
            corners.set(step, one, both - one)
        return corners.whole()

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
