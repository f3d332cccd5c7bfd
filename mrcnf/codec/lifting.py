"""Linear maps that keep volumes as maps of integers: every one is a sequence of shears.

A shear adds to some integers a rounded multiple of others, and is undone by subtracting it. What
rounding does to the map is a matter of a few units of the lattice; that it is exactly invertible
is certain (Calderbank et al. 1998; Hao & Shi 2001). A product is one IEEE multiplication and is
rounded half to even, so all machines agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mrcnf.image import haar


@dataclass(frozen=True)
class Shear:
    """x_i ← x_i + round(factor·x_j), of channels i ≠ j."""

    i: int
    j: int
    factor: float


@dataclass(frozen=True)
class Flip:
    """x_i ← -x_i."""

    i: int


Map = Sequence[Shear | Flip]


def apply(steps: Map, x: Tensor) -> Tensor:
    """The map of the channels of integers (N, C, H, W), int64."""
    channels = list(x.unbind(1))
    for step in steps:
        _move(step, channels, 1)
    return torch.stack(channels, 1)


def undo(steps: Map, x: Tensor) -> Tensor:
    """The inverse of `apply`, exact."""
    channels = list(x.unbind(1))
    for step in reversed(steps):
        _move(step, channels, -1)
    return torch.stack(channels, 1)


def _move(step: Shear | Flip, channels: list[Tensor], sign: int) -> None:
    if isinstance(step, Flip):
        channels[step.i] = -channels[step.i]
    else:
        added = (channels[step.j].double() * step.factor).round().long()
        channels[step.i] = channels[step.i] + sign * added


def rotation(axes: Tensor) -> Map:
    """An orthogonal matrix (C, C) as plane rotations of three shears each, and flips.

    A matrix that is orthogonal to single precision only gives the rotation next to it. Sines and
    cosines come from roots, which all machines round alike.
    """
    rest, turns = axes.double().tolist(), []
    size = len(rest)
    # From the right, Givens rotations of the columns make the matrix diagonal.
    for row in range(size):
        for other in range(row + 1, size):
            along, across = rest[row][row], rest[row][other]
            length = math.sqrt(along * along + across * across)
            if not length:
                continue
            # By at most a quarter turn, which may leave a -1 on the diagonal.
            cosine, sine = abs(along) / length, (across if along >= 0 else -across) / length
            for line in rest:
                a, b = line[row], line[other]
                line[row], line[other] = cosine * a + sine * b, cosine * b - sine * a
            turns.append((row, other, cosine, sine))
    steps: list[Shear | Flip] = []
    for i, j, cosine, sine in turns:
        if sine:
            half = sine / (1 + cosine)
            steps += [Shear(i, j, half), Shear(j, i, -sine), Shear(i, j, half)]
    return [*steps, *(Flip(i) for i in range(size) if rest[i][i] < 0)]


def scaling(factors: Sequence[float]) -> Map:
    """x_i ← factor_i·x_i, positive factors whose product is 1, by twos: diag(s, 1/s)."""
    steps: list[Shear | Flip] = []
    carried = 1.0
    for i, factor in enumerate(factors[:-1]):
        s = carried = carried * factor
        if s != 1:
            j = i + 1
            steps += [Shear(j, i, 1.0), Shear(i, j, s - 1), Shear(j, i, -1 / s)]
            steps += [Shear(i, j, s - s * s)]
    return steps


def sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """The Haar transform of integers with exact sums: int64 (N, C, H, W) to details and sums.

    A pair (a, b) becomes (a + b, ⌊(a - b)/2⌋), along rows, then columns; it can be undone as a + b
    and a - b are both even or both odd. Nothing that leaves a patch's sum as it is changes the
    coarse image. (The S-transform `haar.lift` rounds the mean of a column's means: of pixels that
    trade a unit, that can tell.)

    Returns:
        detail: (N, 3C, H/2, W/2), in units of y1·c/2, y2·c/2 and y3·c/4 of `haar.split`.
        coarse: (N, C, H/2, W/2), sums of four.
    """
    x1, x2, x3, x4 = haar.patches(x)
    (top, top_step), (bottom, bottom_step) = _sum_pair(x1, x2), _sum_pair(x3, x4)
    coarse, rows = _sum_pair(top, bottom)
    columns, diagonal = _sum_pair(top_step, bottom_step)
    return torch.cat((rows, columns, diagonal), 1), coarse


def unsums(detail: Tensor, coarse: Tensor) -> Tensor:
    """The inverse of `sums`, exact."""
    rows, columns, diagonal = detail.chunk(3, dim=1)
    top, bottom = _unsum_pair(coarse, rows)
    top_step, bottom_step = _unsum_pair(columns, diagonal)
    return haar.interleave(*_unsum_pair(top, top_step), *_unsum_pair(bottom, bottom_step))


def _sum_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a + b, (a - b) >> 1


def _unsum_pair(both: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    difference = 2 * half + (both & 1)
    a = (both + difference) >> 1
    return a, both - a
