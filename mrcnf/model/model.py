"""The multi-resolution model: one flow per level, a pyramid between them.

    log p(x) = log p(base) + Σ_levels log p(detail | coarse)

with no determinants from the transform (`haar`). Levels know ratios of sizes only, so images may
have any height and width that are multiples of `MultiResolutionFlow.multiple`; others are padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image.bits import bits_per_dim
from mrcnf.image.noise import check_images, dequantise, quantise
from mrcnf.model.level import Level, LevelLikelihood, check_size, likelihoods

Temperature = float | Mapping[int, float]


class MultiResolutionFlow(nn.Module):
    """The levels together: likelihoods of, and samples from, integer images.

    Args:
        levels: coarsest first; they must agree on the model's configuration.
    """

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        self.config = levels[-1].model
        found = tuple(level.resolution for level in levels)
        if found != self.config.resolutions:
            raise UserError(
                f"levels {list(found)} are at hand, but the model has "
                f"{list(self.config.resolutions)}; train the missing ones with "
                "`mrcnf train --level`"
            )
        if any(level.model != self.config for level in levels):
            raise UserError("the levels disagree on the model's configuration; load them together")
        self.levels = nn.ModuleList(levels)

    @property
    def resolutions(self) -> tuple[int, ...]:
        return self.config.resolutions

    @property
    def multiple(self) -> int:
        """What height and width of images must be multiples of; a power of two."""
        return max(level.multiple for level in self)

    def multiple_at(self, resolution: int) -> int:
        """As `multiple`, of images at a level's scale that the levels above it are to upscale."""
        factor = self.config.finest // self.level(resolution).resolution
        return max([1, *(part.multiple // factor for part in self._above(resolution))])

    def _above(self, resolution: int) -> list[Level]:
        return [level for level in self if level.resolution > resolution]

    @property
    def device(self) -> torch.device:
        return self.level(self.resolutions[0]).device

    def level(self, resolution: int) -> Level:
        """The level that produces images of this resolution."""
        if resolution not in self.resolutions:
            raise UserError(f"there is no level {resolution}: levels are {list(self.resolutions)}")
        level = self.levels[self.resolutions.index(resolution)]
        assert isinstance(level, Level)
        return level

    def __iter__(self) -> Iterator[Level]:
        return (self.level(r) for r in self.resolutions)

    def log_probs_by_level(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        solver: Solver | Mapping[int, Solver] | None = None,
        trace: Trace | None = None,
    ) -> dict[int, LevelLikelihood]:
        """One noise draw's lower bound on log P(images), split by level.

        The constant and the noise density of the bound are shared out by dimension. A solver
        may be given for all levels or by level.
        """
        x, log_q = self._dequantise(images, generator)
        return likelihoods(self, x, log_q, generator=generator, solver=solver, trace=trace)

    def log_prob(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        draws: int = 1,
        importance: bool = False,
        pad: bool = False,
        solver: Solver | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Lower bound on log P of uint8 images (N, C, H, W): (N,) nats.

        Args:
            draws: dequantisation draws per image.
            importance: combine the draws as the importance-weighted bound
                log (1/K) Σ_k p(x_k)/q(u_k) (Burda et al. 2016) instead of their mean. With
                estimated traces the exponential makes it optimistic: use the exact trace.
            pad: let H and W be no multiples of `multiple`, and repeat the last row and column
                up to the next ones. The padded image's bound is one on log P of the image, which
                is the sum over everything that might be there; its padding costs bits.

        Raises:
            UserError: images of another type or number of channels, or of a size that the
                levels cannot take.
        """
        if draws < 1:
            raise UserError(f"draws must be at least 1, got {draws}")
        check_images(images, self.config.channels)
        if pad:
            images = _padded(images, self.multiple)
        bounds = []
        for _ in range(draws):
            parts = self.log_probs_by_level(
                images, generator=generator, solver=solver, trace=trace
            )
            bounds.append(torch.stack([part.log_prob for part in parts.values()]).sum(0))
        stacked = torch.stack(bounds)
        if importance:
            return stacked.logsumexp(0) - math.log(draws)
        return stacked.mean(0)

    def bits_per_dim(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        draws: int = 1,
        importance: bool = False,
        pad: bool = False,
        solver: Solver | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """`log_prob` in bits per dimension of the images as they are given, (N,): upper bounds."""
        log_prob = self.log_prob(
            images,
            generator=generator,
            draws=draws,
            importance=importance,
            pad=pad,
            solver=solver,
            trace=trace,
        )
        return bits_per_dim(log_prob, images.shape[1:].numel())

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        size: tuple[int, int] | None = None,
        temperature: Temperature = 1.0,
        generator: torch.Generator | None = None,
        solver: Solver | None = None,
    ) -> Tensor:
        """n images: uint8 (n, C, H, W).

        Args:
            size: H and W, multiples of `multiple`; by default the finest resolution.
            temperature: standard deviation of the latent noise, for all levels or by level.
        """
        drawn = self.sample_levels(
            n, size=size, temperature=temperature, generator=generator, solver=solver
        )
        return drawn[self.config.finest]

    @torch.no_grad()
    def sample_levels(
        self,
        n: int,
        *,
        size: tuple[int, int] | None = None,
        temperature: Temperature = 1.0,
        generator: torch.Generator | None = None,
        solver: Solver | None = None,
    ) -> dict[int, Tensor]:
        """The images that `sample` draws, and those that they grew from: uint8 by resolution."""
        size = size or (self.config.finest, self.config.finest)
        if n < 0 or len(size) != 2:
            raise UserError(f"cannot draw {n} images of size {size}; give a number and (H, W)")
        check_size(self, size)
        grown = self._grow(self, n, size, None, temperature, generator, solver)
        return {r: self._quantise(x) for r, x in zip(self.resolutions, grown, strict=True)}

    @torch.no_grad()
    def upscale(
        self,
        images: Tensor,
        level: int | None = None,
        *,
        temperature: Temperature = 1.0,
        generator: torch.Generator | None = None,
        solver: Solver | None = None,
    ) -> Tensor:
        """Draw the finest image of which each given one is the average, to rounding.

        In an integer pyramid it is the coarse image that the S-transform gives (`haar.lift`),
        exactly, which is up to one grey level a split below the average.

        Details that leave the range of pixels are shrunk, patch by patch, until they fit. Where a
        network halves its input, images whose sides it cannot halve are padded by repeating the
        last row and column, and the result is cropped.

        Args:
            images: uint8 (N, C, h, w), of any height and width.
            level: at whose scale they are; by default the level of which they have the size.

        Returns:
            uint8 (N, C, f·h, f·w) with f the finest resolution over the level's.
        """
        check_images(images, self.config.channels)
        h, w = images.shape[2:]
        if level is None and (h != w or h not in self.resolutions):
            raise UserError(
                f"{h}×{w} images have the size of none of the levels {list(self.resolutions)}: "
                f"say at which level's scale they are, e.g. level={self.resolutions[0]}"
            )
        start = self.level(h if level is None else level)
        factor = self.config.finest // start.resolution
        above = self._above(start.resolution)
        if not above:
            return images.clone()
        padded = _padded(images, self.multiple_at(start.resolution))
        cells = 2**self.config.nbits
        x = ((padded.to(self.device) >> (8 - self.config.nbits)).to(start.dtype) + 0.5) / cells
        size = (factor * x.shape[2], factor * x.shape[3])
        check_size(above, size)
        grown = self._grow(above, len(x), size, x, temperature, generator, solver)[-1]
        return self._quantise(grown)[..., : factor * h, : factor * w]

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        solver: Solver | None = None,
    ) -> dict[int, Tensor]:
        """The latents of dequantised images, by level."""
        x, _ = self._dequantise(images, generator)
        return {level.resolution: level.encode(x, solver) for level in self}

    @torch.no_grad()
    def decode(self, latents: Mapping[int, Tensor], *, solver: Solver | None = None) -> Tensor:
        """uint8 images from latents by level; the inverse of `encode` up to solver error."""
        x: Tensor | None = None
        for level in self:
            x = level.generate(latents[level.resolution], x, solver)
        assert x is not None
        return self._quantise(x)

    def interpolate(
        self,
        first: Tensor,
        second: Tensor,
        steps: int = 8,
        *,
        generator: torch.Generator | None = None,
        solver: Solver | None = None,
    ) -> Tensor:
        """Spherical interpolation between latents: uint8 (steps, N, C, H, W), ends included."""
        if first.shape != second.shape or steps < 1:
            raise UserError(
                f"cannot interpolate between images of {tuple(first.shape)} and "
                f"{tuple(second.shape)} in {steps} steps: they must be alike, the steps at least 1"
            )
        a = self.encode(first, generator=generator, solver=solver)
        b = self.encode(second, generator=generator, solver=solver)
        angles = torch.linspace(0, math.pi / 2, steps).tolist()
        frames = [
            self.decode(
                {r: math.cos(angle) * a[r] + math.sin(angle) * b[r] for r in a}, solver=solver
            )
            for angle in angles
        ]
        return torch.stack(frames)

    def _dequantise(
        self, images: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        check_images(images, self.config.channels)
        check_size(self, images.shape[2:], "; crop them, or pad them (pad=True) for a likelihood")
        return dequantise(
            images.to(self.device),
            nbits=self.config.nbits,
            kind=self.config.pixel_noise,
            generator=generator,
            dtype=self.level(self.config.finest).dtype,
        )

    def _grow(
        self,
        levels: Iterable[Level],
        n: int,
        size: tuple[int, int],
        x: Tensor | None,
        temperature: Temperature,
        generator: torch.Generator | None,
        solver: Solver | None,
    ) -> list[Tensor]:
        """n images of each of the levels, in density units, the finest ones of a size.

        They grow on the coarse images x, whose details are contained, or from nothing.
        """
        contain, images = x is not None, []
        if not isinstance(temperature, Mapping):
            temperature = dict.fromkeys(self.resolutions, temperature)
        for resolution, value in temperature.items():
            if self.level(resolution) and not 0 <= value < math.inf:
                raise UserError(f"temperature must be 0 or more, and finite; got {value}")
        for level in levels:
            scale = temperature.get(level.resolution, 1.0)
            shape = (n, *level.latent_shape(*size))
            noise = torch.randn(shape, generator=generator, device=self.device, dtype=level.dtype)
            finer = level.generate(scale * noise, x, solver)
            x = level.pyramid.contain(finer, x) if contain and x is not None else finer
            images.append(x)
        return images

    def _quantise(self, x: Tensor) -> Tensor:
        return quantise(x, nbits=self.config.nbits)


def _padded(images: Tensor, unit: int) -> Tensor:
    """Images whose last row and column are repeated until both sides are multiples of a unit."""
    h, w = images.shape[2:]
    missing = (0, -w % unit, 0, -h % unit)
    if not any(missing):
        return images
    return F.pad(images.float(), missing, mode="replicate").to(images.dtype)
