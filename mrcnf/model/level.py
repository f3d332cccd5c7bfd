"""One level of the model: what it models, in which units, and with which flow.

Levels are named by the resolution that they produce: level 32 takes 16×16 to 32×32, the
coarsest level is the base. Levels share nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mrcnf.errors import UserError
from mrcnf.flows import velocity
from mrcnf.flows.base import FlowResult
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.solve import Solver, Statistics
from mrcnf.flows.tangents import mix
from mrcnf.flows.trace import Trace
from mrcnf.image import haar, pyramids
from mrcnf.image.bits import log_prob_of_integers
from mrcnf.image.learned_noise import Dequantiser
from mrcnf.image.noise import GAUSSIAN_STD
from mrcnf.model.settings import FieldConfig, ModelConfig

LOGIT_ALPHA = 0.05
class Level(nn.Module):
    """One level: its coefficients, standardised, and the flow that models them.

    The base level's coefficients are its pixels in [0, 1], (N, C, R, R); another level's are
    the details (N, 3C, R/2, R/2), given the coarse image (N, C, R/2, R/2).

    Args:
        model: what the levels agree on.
        resolution: the side of the images that this level produces.
    """

    mean: Tensor
    axes: Tensor
    std: Tensor
    coarse_mean: Tensor
    coarse_std: Tensor
    noise: Tensor

    def __init__(
        self,
        model: ModelConfig,
        resolution: int,
        field: FieldConfig | None = None,
        solver: Solver | None = None,
        trace: Trace | None = None,
    ) -> None:
        super().__init__()
        if resolution not in model.resolutions:
            raise UserError(
                f"there is no level {resolution}: the levels are {list(model.resolutions)}"
            )
        self.model, self.resolution = model, resolution
        self.field, self.solver, self.trace = (
            field or FieldConfig(),
            solver or Solver(),
            trace or Trace(),
        )
        self.is_base = resolution == model.resolutions[0]
        channels = model.channels * (1 if self.is_base else 3)
        coarse_channels = 0 if self.is_base else model.channels
        side = resolution if self.is_base else resolution // 2
        self.shape = (channels, side, side)
        if side % 2 ** (self.field.scales - 1):
            raise UserError(
                f"level {resolution} works on {side}×{side} positions, which cannot be halved "
                f"{self.field.scales - 1} times; lower field.scales"
            )
        if self._integers() and self._through_logit:
            raise UserError(
                f"level {resolution}: a logit bends the lattice of integers; set "
                "model.base = affine or field.lattice = false there"
            )
        self.flow = ContinuousFlow(
            [
                velocity.build(
                    self.field.kind,
                    channels,
                    coarse_channels,
                    self.field.width,
                    self.field.depth,
                    self.field.scales,
                    self.field.attention,
                    self.field.path,
                    self._integers(),
                )
                for _ in range(self.field.blocks)
            ],
            name=f"level {resolution}",
        )
        exact = model.pyramid == "exact"
        self.dequantiser = None
        if model.dequantisation == "variational" and not (exact and resolution < model.finest):
            pairs = model.channels if exact and not self.is_base else 0
            self.dequantiser = Dequantiser(channels, coarse_channels, pairs)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("axes", torch.eye(channels))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.register_buffer("coarse_mean", torch.zeros(model.channels, 1, 1))
        self.register_buffer("coarse_std", torch.ones(model.channels, 1, 1))
        self.register_buffer("noise", torch.zeros(channels, 1, 1))

    @property
    def dims(self) -> int:
        return math.prod(self.shape)

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """This level's coefficients and coarse image from images x at any finer resolution.

        x: (N, C, H, W) in density units, H = W = R·2^k (or crops of such, down to 2^k·2).
        """
        times = int(math.log2(self.model.finest // self.resolution))
        kind, nbits = self.model.pyramid, self.model.nbits
        x = pyramids.reduce(kind, x, nbits, times)
        if self.is_base:
            return x, None
        return pyramids.split(kind, x, nbits)

    def merge(self, detail: Tensor, coarse: Tensor) -> Tensor:
        """This level's images from its coefficients and coarse images."""
        return pyramids.merge(self.model.pyramid, detail, coarse, self.model.nbits)

    def standardise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients to flow units y, and log|det| (N,) of that map, in nats.

        y = axes·(values - mean) / std, channel by channel, with orthogonal axes.
        """
        log_det = values.new_zeros(len(values))
        if self._through_logit:
            values, log_det = _logit(values)
        per_channel = math.prod(values.shape[2:])
        y = mix(self.axes, values - self.mean) / self.std
        return y, log_det - per_channel * self.std.log().sum()

    def unstandardise(self, y: Tensor) -> Tensor:
        """The inverse of `standardise`: flow units to coefficients."""
        values = mix(self.axes.T, y * self.std) + self.mean
        if self._through_logit:
            return (values.sigmoid() - LOGIT_ALPHA) / (1 - 2 * LOGIT_ALPHA)
        return values

    def condition(self, coarse: Tensor | None) -> Tensor | None:
        """The coarse image as the velocity network sees it."""
        if coarse is None:
            return None
        known = pyramids.condition(self.model.pyramid, coarse, self.model.nbits)
        return (known - self.coarse_mean) / self.coarse_std

    def prepare(
        self, x: Tensor, clean: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the flow is of: y and its condition, from dequantised images x, and log|det| (N,).

        Args:
            clean: images to take y from instead, x giving the condition.
        """
        values, coarse = self.coefficients(x)
        if clean is not None:
            values, _ = self.coefficients(clean)
        condition = self.condition(coarse)
        if self.dequantiser is None:
            y, log_det = self.standardise(values)
            return y, condition, log_det
        # The noise is the pixels' at the finest level of an exact pyramid, else the coefficients'.
        of_pixels, scale = self.model.pyramid == "exact", 2**self.model.nbits
        cells = (x if of_pixels else values) * scale
        integers = cells.floor()

        def flow_units(cells: Tensor) -> tuple[Tensor, Tensor]:
            found = cells / scale
            return self.standardise(self.coefficients(found)[0] if of_pixels else found)

        noise, log_rise = self.dequantiser(
            cells - integers, flow_units(integers + 0.5)[0], condition
        )
        y, log_det = flow_units(integers + noise)
        return y, condition, log_det + log_rise

    @torch.no_grad()
    def fit_standardisation(self, x: Tensor) -> None:
        """Set the units from dequantised training images x, and tell the fields."""
        values, coarse = self.coefficients(x)
        if self._through_logit:
            values, _ = _logit(values)
        if self.model.whiten:
            channels = len(self.axes)
            covariance = torch.cov(values.movedim(1, 0).flatten(1).double())
            axes = torch.linalg.eigh(covariance.reshape(channels, channels)).eigenvectors.T
            # Of the two directions of an axis, the one that makes its largest entry positive.
            largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
            self.axes.copy_(axes * largest.sign())
        self._set_moments(self.mean, self.std, mix(self.axes, values))
        self.mean.copy_(mix(self.axes.T, self.mean[None])[0])
        if coarse is not None:
            known = pyramids.condition(self.model.pyramid, coarse, self.model.nbits)
            self._set_moments(self.coarse_mean, self.coarse_std, known)
        if self.noisy:
            # A channel of nothing but noise has no path to follow; this leaves it one.
            self.noise.copy_((self._noise_std() / self.std).clamp(max=0.9))
        cells = self._cells()
        for i, field in enumerate(self.flow.fields):
            noise = self.noise if i == 0 else torch.zeros_like(self.noise)
            field.calibrate(noise, cells)  # type: ignore[operator]

    @staticmethod
    def _set_moments(mean: Tensor, std: Tensor, values: Tensor) -> None:
        mean.copy_(values.mean((0, 2, 3))[:, None, None])
        std.copy_(values.std((0, 2, 3)).clamp_min(1e-4)[:, None, None])

    @property
    def noisy(self) -> bool:
        """Whether the data are clean coefficients with Gaussian noise, `noise` in flow units.

        Through a logit the noise is not additive: there it is part of the data.
        """
        return self.model.dequantisation == "gaussian" and not self._through_logit

    @property
    def _through_logit(self) -> bool:
        return self.is_base and self.model.base == "logit"

    def _integers(self) -> int:
        """How many integers (see `_cells`) at each position the field is to see."""
        exact = self.model.pyramid == "exact"
        if not self.field.lattice or (exact and self.resolution < self.model.finest):
            return 0
        return self.model.channels * (1 if self.is_base else 4 if exact else 3)

    def _cells(self) -> Tensor:
        """The integers at one position from its y, coarse image and 1: see `Field.calibrate`.

        Those are pixels; in the integer pyramid the details are integers themselves.
        """
        size = len(self.mean) + (0 if self.is_base else len(self.coarse_mean))
        probes = torch.cat((torch.eye(size), torch.zeros(1, size))).to(self.mean)[..., None, None]
        values = self.unstandardise(probes[:, : len(self.mean)])
        if self.model.pyramid == "exact" and not self.is_base:
            coarse = probes[:, len(self.mean) :] * self.coarse_std + self.coarse_mean
            values = haar.merge(values, coarse)
        cells = values.flatten(1) * 2**self.model.nbits - 0.5
        return torch.cat((cells[:-1] - cells[-1], cells[-1:])).T

    def _noise_std(self) -> float:
        """Std of this level's share of Gaussian dequantisation noise, in density units.

        Each exact 2×2 mean halves the std of white noise; a detail is a sum of four, over c.
        """
        pixel = GAUSSIAN_STD / 2**self.model.nbits
        if self.model.pyramid == "integer":
            return pixel
        at_level = pixel * self.resolution / self.model.finest
        return at_level if self.is_base else at_level * 2 / haar.SCALE

    def log_prob(
        self,
        x: Tensor,
        *,
        solver: Solver | None = None,
        trace: Trace | None = None,
        end: float = 1.0,
        regularise: bool = False,
        generator: torch.Generator | None = None,
    ) -> FlowResult:
        """Log-density of this level's coefficients of images x, as `ContinuousFlow.log_prob`."""
        y, condition, log_det = self.prepare(x)
        result = self.flow.log_prob(
            y,
            condition,
            solver=solver or self.solver,
            trace=trace or self.trace,
            end=end,
            regularise=regularise,
            generator=generator,
        )
        result.log_prob = result.log_prob + log_det
        return result

    def bound(self, log_density: Tensor, log_q: Tensor) -> Tensor:
        """From this level's log-density to its share of the bound on log P: (N,) nats.

        The noise's log_q and the volume of the pixel cells are shared out by dimension, so the
        levels' bounds add up to `log_prob_of_integers` of the whole.
        """
        share = self.dims / self.model.dims
        return log_prob_of_integers(
            log_density, share * log_q, self.dims, self.model.nbits
        )

    def generate(
        self, latent: Tensor, coarse: Tensor | None, solver: Solver | None = None
    ) -> Tensor:
        """Images (N, C, R, R) in density units from noise (N, *shape) and the coarse image."""
        y = self.flow.transport(
            latent,
            self.condition(coarse),
            backwards=True,
            solver=solver or self.solver,
        )
        values = self.unstandardise(y)
        return values if coarse is None else self.merge(values, coarse)

    def encode(self, x: Tensor, solver: Solver | None = None) -> Tensor:
        """The latent of this level's coefficients of images x."""
        y, condition, _ = self.prepare(x)
        return self.flow.transport(y, condition, solver=solver or self.solver)


@dataclass
class LevelLikelihood:
    """One level's part of the likelihood of a batch."""

    log_prob: Tensor
    """(N,) nats: with the level's share of cell volumes and noise; sums to the model's bound."""
    statistics: Statistics


def likelihoods(
    levels: Iterable[Level],
    x: Tensor,
    log_q: Tensor,
    *,
    generator: torch.Generator | None = None,
    solver: Solver | Mapping[int, Solver] | None = None,
    trace: Trace | None = None,
) -> dict[int, LevelLikelihood]:
    """The levels' shares of the bound for dequantised images x (N, C, H, W) and their log q (N,).

    A solver may be given for all levels or by level; without one each level has its own.
    """
    result = {}
    for level in levels:
        own = solver.get(level.resolution) if isinstance(solver, Mapping) else solver
        flow = level.log_prob(x, solver=own, trace=trace, generator=generator)
        bound = level.bound(flow.log_prob, log_q)
        result[level.resolution] = LevelLikelihood(bound, flow.statistics)
    return result


def _logit(x: Tensor) -> tuple[Tensor, Tensor]:
    """logit(α + (1-2α)x) and its log-determinant (N,) (Dinh et al. 2017, §4.1)."""
    squeezed = LOGIT_ALPHA + (1 - 2 * LOGIT_ALPHA) * x
    y = squeezed.logit()
    slope = math.log(1 - 2 * LOGIT_ALPHA) - squeezed.log() - (-squeezed).log1p()
    return y, slope.flatten(1).sum(1)


