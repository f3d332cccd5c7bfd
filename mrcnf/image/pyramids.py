"""The two ways from an image to a coarser one: exact means, or integers all the way down.

Both split dequantised images x = (X + u)/2^b into details and a coarser image and keep
volumes, so that densities pass between resolutions unchanged. Each says how noise spreads, and
brings the patches of a drawn image that overshoot back into range (`contain`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from mrcnf.errors import UserError
from mrcnf.image import haar
from mrcnf.image.noise import GAUSSIAN_STD
from mrcnf.image.straight import asked_for, floor, straight


class Pyramid(ABC):
    """How images become details and coarser images, and what that makes of the noise in them.

    Args:
        nbits: b, bits per pixel and channel.
    """

    own_noise: bool
    """Whether every level is a model of integers with noise of its own; else there is one noise,
    that of the finest pixels, and coarser levels see its means."""

    def __init__(self, nbits: int = 8) -> None:
        self.nbits = nbits

    @abstractmethod
    def down(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) to details (N, 3C, H/2, W/2) and coarser images (N, C, H/2, W/2)."""

    @abstractmethod
    def up(self, detail: Tensor, coarse: Tensor) -> Tensor:
        """The inverse of `down`."""

    @abstractmethod
    def coarsen(self, x: Tensor, times: int) -> Tensor:
        """The coarse image after going down so many times."""

    @abstractmethod
    def known(self, coarse: Tensor) -> Tensor:
        """What the finer level is told of a coarse image."""

    @abstractmethod
    def contain(self, x: Tensor, coarse: Tensor) -> Tensor:
        """Shrink the details of overshooting patches of x until all its pixels are in [0, 1).

        The coarse image (N, C, H/2, W/2), itself in range, stays what it was.
        """

    @abstractmethod
    def noise_std(self, halvings: int, base: bool) -> float:
        """Standard deviation of Gaussian dequantisation noise in a level's coefficients.

        Args:
            halvings: how many times the level's images are coarser than the finest.
            base: whether its coefficients are pixels, or details.
        """

    @abstractmethod
    def integers(self, halvings: int, base: bool) -> int:
        """How many integers of each channel `cells` finds at a position; 0 where there are none."""

    @abstractmethod
    def cells(self, values: Tensor, coarse: Tensor | None) -> Tensor:
        """The integers' values (N, P, …) in a level's coefficients and its coarse image."""

    def learns_noise(self, halvings: int) -> bool:
        """Whether a level so much coarser than the finest has noise that it may learn."""
        return self.own_noise or halvings == 0


class Exact(Pyramid):
    """The unimodular Haar transform of x, noise included (`haar.split`).

    Every level is conditioned on the exact coarse image of the noise in the finest.
    """

    own_noise = False

    def down(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return haar.split(x)

    def up(self, detail: Tensor, coarse: Tensor) -> Tensor:
        return haar.merge(detail, coarse)

    def coarsen(self, x: Tensor, times: int) -> Tensor:
        return haar.means(x, times)

    def known(self, coarse: Tensor) -> Tensor:
        return coarse

    def contain(self, x: Tensor, coarse: Tensor) -> Tensor:
        # Clamping pixels would move the mean of the patch; shrinking it towards its mean does not.
        mean = coarse.repeat_interleave(2, -1).repeat_interleave(2, -2)
        deviation = x - mean
        room = torch.where(deviation > 0, 1 - mean, mean)
        fits = torch.where(deviation == 0, 1.0, room / deviation.abs()).clamp(0, 1)
        least = -F.max_pool2d(-fits, 2)
        return mean + deviation * least.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def noise_std(self, halvings: int, base: bool) -> float:
        # Each 2×2 mean halves the deviation of white noise; a detail is a sum of four, over c.
        std = GAUSSIAN_STD / 2 ** (self.nbits + halvings)
        return std if base else std * 2 / haar.SCALE

    def integers(self, halvings: int, base: bool) -> int:
        if halvings:
            return 0  # means of pixels blur their lattice too much
        return 1 if base else 4

    def cells(self, values: Tensor, coarse: Tensor | None) -> Tensor:
        return values if coarse is None else haar.merge(values, coarse)


class Integer(Pyramid):
    """The S-transform of the integers X (`haar.lift`), their noise u dealt out to what it gives.

    Three pixels' noise goes to the details, one's to the coarse image. Every level is a model of
    its own, P(detail integers | coarse integers), and is conditioned on 8-bit coarse images.
    """

    own_noise = True

    def down(self, x: Tensor) -> tuple[Tensor, Tensor]:
        integers, noise = self._parts(x)
        detail, coarse = haar.lift(integers)
        first, *others = haar.patches(noise)
        cells = 2**self.nbits
        detail = (detail + torch.cat(others, 1)) / cells
        coarse = (coarse + first) / cells
        if not asked_for():
            return detail, coarse
        rows, columns, diagonal, means = self._unrounded(x)
        return straight(detail, torch.cat((rows, columns, diagonal), 1)), straight(coarse, means)

    def _unrounded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`haar.lift` of x without its floors, whose gradient `down` has."""
        detail, means = haar.split(x)
        rows, columns, diagonal = detail.chunk(3, dim=1)
        return rows * haar.SCALE / 2, columns * haar.SCALE / 2, diagonal * haar.SCALE, means

    def up(self, detail: Tensor, coarse: Tensor) -> Tensor:
        (details, others), (means, first) = self._parts(detail), self._parts(coarse)
        noise = haar.interleave(first, *others.chunk(3, dim=1))
        return (haar.unlift(details, means) + noise) / 2**self.nbits

    def coarsen(self, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            _, x = self.down(x)
        return x

    def known(self, coarse: Tensor) -> Tensor:
        cells = 2**self.nbits
        return (floor(coarse * cells) + 0.5) / cells

    def contain(self, x: Tensor, coarse: Tensor) -> Tensor:
        detail, _ = self.down(x)
        (details, noise), (means, _) = self._parts(detail), self._parts(coarse)
        kept = torch.zeros_like(details)
        undecided = torch.ones_like(means, dtype=torch.bool)
        for sixteenth in range(16, 0, -1):  # at 0 all four pixels are the mean
            shrunk = torch.div(details * sixteenth, 16, rounding_mode="trunc")
            pixels = torch.stack(haar.patches(haar.unlift(shrunk, means)))
            fits = undecided & ((pixels >= 0) & (pixels < 2**self.nbits)).all(0)
            kept = torch.where(fits.repeat(1, 3, 1, 1), shrunk, kept)
            undecided &= ~fits
        return self.up((kept + noise) / 2**self.nbits, coarse)

    def noise_std(self, halvings: int, base: bool) -> float:
        return GAUSSIAN_STD / 2**self.nbits

    def integers(self, halvings: int, base: bool) -> int:
        return 1 if base else 3

    def cells(self, values: Tensor, coarse: Tensor | None) -> Tensor:
        return values  # details are integers themselves

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which cell of the integers' lattice, int32, and where in it, in [0, 1)."""
        cells = x * 2**self.nbits
        integers = cells.floor()
        # A shade below an integer rounds up to 1 from it; here, merging stays within the cell.
        end = 1 - torch.finfo(x.dtype).eps * 2**self.nbits
        return integers.to(torch.int32), (cells - integers).clamp(max=end)


PYRAMIDS: dict[str, type[Pyramid]] = {"exact": Exact, "integer": Integer}


def build(name: str, nbits: int = 8) -> Pyramid:
    """A pyramid by its name in `PYRAMIDS`."""
    if name not in PYRAMIDS:
        raise UserError(f"unknown pyramid {name!r}; choose one of {', '.join(PYRAMIDS)}")
    return PYRAMIDS[name](nbits)
