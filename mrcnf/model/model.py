"""The multi-resolution model: one flow per level, a pyramid between them.

    log p(x) = log p(base) + Σ_levels log p(detail | coarse)

with no determinants from the transform (`haar`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image import pyramids
from mrcnf.image.bits import bits_per_dim
from mrcnf.image.noise import check_images, dequantise, quantise
from mrcnf.model.level import Level, LevelLikelihood, likelihoods


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
    def device(self) -> torch.device:
        return self.level(self.resolutions[0]).mean.device

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
        solver: Solver | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Lower bound on log P of uint8 images (N, C, H, W): (N,) nats.

        Args:
            draws: dequantisation draws per image.
            importance: combine the draws as the importance-weighted bound
                log (1/K) Σ_k p(x_k)/q(u_k) (Burda et al. 2016) instead of their mean. With
                estimated traces the exponential makes it optimistic: use the exact trace.
        """
        if draws < 1:
            raise UserError(f"draws must be at least 1, got {draws}")
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
        solver: Solver | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """`log_prob` in bits per dimension, (N,); lower is better."""
        log_prob = self.log_prob(
            images,
            generator=generator,
            draws=draws,
            importance=importance,
            solver=solver,
            trace=trace,
        )
        return bits_per_dim(log_prob, self.config.dims)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        temperature: float | Mapping[int, float] = 1.0,
        generator: torch.Generator | None = None,
        solver: Solver | None = None,
    ) -> Tensor:
        """n images at the finest resolution: uint8 (n, C, H, W).

        Args:
            temperature: standard deviation of the latent noise, for all levels or by level.
        """
        return self._quantise(self._grow(n, None, temperature, generator, solver)[-1])

    @torch.no_grad()
    def upscale(
        self,
        images: Tensor,
        *,
        temperature: float | Mapping[int, float] = 1.0,
        generator: torch.Generator | None = None,
        solver: Solver | None = None,
    ) -> Tensor:
        """Draw the finest image of which each given one is the average, to rounding.

        In an integer pyramid it is the coarse image that the S-transform gives (`haar.lift`),
        exactly, which is up to one grey level a split below the average.

        Details that leave the range of pixels are shrunk, patch by patch, until they fit.

        Args:
            images: uint8 (N, C, r, r) at any level's resolution r.

        Returns:
            uint8 (N, C, H, W) at the finest resolution.
        """
        check_images(images, self.config.channels)
        h, w = images.shape[2:]
        if h != w or h not in self.resolutions:
            raise UserError(
                f"cannot upscale {h}×{w} images: the model's levels are {list(self.resolutions)}"
            )
        if h == self.config.finest:
            return images.clone()
        cells = 2**self.config.nbits
        x = ((images >> (8 - self.config.nbits)).to(self.level(h).mean) + 0.5) / cells
        grown = self._grow(len(images), x, temperature, generator, solver, contain=True)
        return self._quantise(grown[-1])

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
        side = self.config.finest
        if tuple(images.shape[2:]) != (side, side):
            raise UserError(
                f"images are {images.shape[2]}×{images.shape[3]} but the model's finest level is "
                f"{side}×{side}; resize them or choose another model"
            )
        return dequantise(
            images.to(self.device),
            nbits=self.config.nbits,
            kind=self.config.pixel_noise,
            generator=generator,
            dtype=self.level(side).mean.dtype,
        )

    def _grow(
        self,
        n: int,
        x: Tensor | None,
        temperature: float | Mapping[int, float],
        generator: torch.Generator | None,
        solver: Solver | None,
        contain: bool = False,
    ) -> list[Tensor]:
        """Images of every level above x (all levels without x), coarsest first."""
        images = []
        for level in self:
            if x is not None and level.resolution <= x.shape[-1]:
                continue
            scale = temperature if isinstance(temperature, (int, float)) else temperature.get(
                level.resolution, 1.0
            )
            latent = scale * torch.randn(
                n, *level.shape, generator=generator, device=self.device, dtype=level.mean.dtype
            )
            finer = level.generate(latent, x, solver)
            if contain and x is not None:
                finer = pyramids.contain(self.config.pyramid, finer, x, self.config.nbits)
            x = finer
            images.append(x)
        return images

    def _quantise(self, x: Tensor) -> Tensor:
        return quantise(x, nbits=self.config.nbits)
