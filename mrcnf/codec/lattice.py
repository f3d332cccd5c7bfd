"""The lattice of a level: which integers its coefficients are, and where in flow units these lie.

Every pixel's cell is cut into 2^bits sub-cells. The pixel X with noise u in sub-cell U of its cell
is the integer X·2^bits + U, and what a pyramid makes of integers are integers again
(`lifting.sums`): means on a lattice four times as fine at every level, details on one of c times
their images' spacing. `Lattice` then turns them to the axes of a level's units.

The flow sees y = integer·unit in floating point. Encoder and decoder get the same y from the same
integers; nothing else is asked of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mrcnf.codec import lifting
from mrcnf.codec.ans import CodingError
from mrcnf.codec.tables import LOG_2, OCTAVE, nearest
from mrcnf.image import haar
from mrcnf.model.level import Level

_WIDEST = 40 * OCTAVE
_FURTHEST = 1 << 50
"""Integers of coefficients stay below it; what a network makes of that is no use, but exact."""


@dataclass(frozen=True)
class Lattice:
    """Integers of one level's coefficients and their places in flow units."""

    turn: lifting.Map
    """From the coefficients as the pyramid gives them to the level's axes."""
    offset: Tensor
    """(C, 1, 1), int64: which turned integers are 0 in flow units, and so 0 in a state."""
    unit: Tensor
    """(C, 1, 1), or (1, 1, 1) for all channels, double: what one more is in flow units; of few
    digits, so that products are exact."""
    cell: float
    """How many integers of the noise's coarsest channel make up the width of a pixel's cell."""
    depth: float
    """log₂ of how many integers there are to a coefficient's share of a cell's volume."""

    def enter(self, values: Tensor) -> Tensor:
        """The pyramid's integers (N, C, H, W), int64, as the flow's state."""
        return lifting.apply(self.turn, values) - self.offset

    def leave(self, state: Tensor) -> Tensor:
        """The inverse of `enter`."""
        return lifting.undo(self.turn, state + self.offset)

    def real(self, state: Tensor) -> Tensor:
        """Flow units, in double precision."""
        return state.double() * self.unit

    def nearest(self, y: Tensor) -> Tensor:
        """The integers nearest to a point.

        Raises:
            CodingError: it is not finite.
        """
        places = (y.double() / self.unit).round()
        if not bool(places.isfinite().all()):
            raise CodingError("the flow's answer is not finite")
        return places.clamp(-_FURTHEST, _FURTHEST).long()

    def index(self, cells: float) -> int:
        """Index (`tables`) of a standard deviation given in cells."""
        return nearest(cells * self.cell)

    def deviations(self, log_std: Tensor) -> Tensor:
        """Indices of standard deviations, from their logs in flow units."""
        index = OCTAVE * (log_std.double() / LOG_2 - self.unit.log2())
        return index.round().clamp(0, _WIDEST).long()


def of_level(level: Level, bits: int, *, even: bool) -> Lattice:
    """The lattice of a level.

    Args:
        bits: of the sub-cells of its images' pixels: of the finest pixels in an exact pyramid
            (coarser ones have more), of its own coefficients' in an integer one.
        even: let the unit be the same for all channels, so that rounding a sum of different
            channels is exact; the noise, isotropic in cells otherwise, is so in flow units then.
    """
    units, own = level.units, level.pyramid.own_noise
    size = level.channels
    axes = torch.eye(size) if units.axes is None else units.axes
    # Spacing of the lattice in cells, and how the integers have to be scaled for it.
    spacing, turn = 2.0**-bits, list[lifting.Shear | lifting.Flip]()
    if not own:
        spacing /= 4.0**level.halvings
        if not level.is_base:
            turn += lifting.scaling(_bands(level.model.channels))
            spacing *= haar.SCALE
    turn += lifting.rotation(axes)
    depth = -math.log2(spacing)
    spacing /= 2.0**level.model.nbits
    std = units.std.double().flatten()
    if even:
        mean = std.log().mean().exp()
        turn += lifting.scaling((mean / std).tolist())
        unit = (spacing / mean).reshape(1)
        cell = float(mean / std.max() / spacing) / 2**level.model.nbits
    else:
        unit, cell = spacing / std, 1 / spacing / 2**level.model.nbits
    unit = _short(unit)[:, None, None]
    middle = axes.double() @ units.mean.double().flatten() / std
    offset = (middle[:, None, None] / unit).round().long()
    return Lattice(turn, offset, unit, cell, depth)


def density_units(values: Tensor, bits: int, halvings: int, nbits: int = 8) -> Tensor:
    """The middles of sub-cells: integers of an exact pyramid's images to density units.

    Args:
        values: of images so many times halved; the finest pixels' have 2^bits sub-cells.
        nbits: bits per pixel.
    """
    finer = 4.0**halvings
    return (values.double() + 0.5 * finer) / (finer * 2.0 ** (bits + nbits))


def _bands(channels: int) -> list[float]:
    """From units of y1·c/2, y2·c/2 and y3·c/4 to the same for all three: y·c^-1."""
    half, double = 2 / haar.SCALE**2, 4 / haar.SCALE**2
    return [half] * (2 * channels) + [double] * channels


def _short(x: Tensor) -> Tensor:
    """Rounded to 20 binary digits: times an integer below 2^33, it is exact."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**20).round() / 2**20, exponent)
