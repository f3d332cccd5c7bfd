"""One level of the model: what it models, in which units, and with which flow.

Levels are named by the resolution that they produce: level 32 takes 16×16 to 32×32, the
coarsest level is the base. Levels share nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from mrcnf import haar, pixels, velocity
from mrcnf.errors import UserError
from mrcnf.flow import ContinuousFlow, FlowResult, Trace
from mrcnf.solve import Solver, Statistics

LOGIT_ALPHA = 0.05
BASES = ("affine", "logit")


@dataclass(frozen=True)
class ModelConfig:
    """What all levels of a model agree on."""

    resolutions: tuple[int, ...] = (8, 16, 32)
    """Side of each level's images in pixels, coarsest (the base) first, each twice the last."""
    channels: int = 0
    """Channels of the images: 1 or 3; 0 takes the data's."""
    nbits: int = 8
    """Bits per pixel and channel that are modelled; fewer drop the low bits."""
    dequantisation: str = "uniform"
    """Noise in the pixel cells: uniform or gaussian."""
    whiten: bool = True
    """Turn each level's channels to their principal axes before they are scaled to unit variance;
    false scales them as they are."""
    base: str = "affine"
    """Map of base pixels to the line: affine, or logit (α = 0.05)."""

    def __post_init__(self) -> None:
        r = self.resolutions
        if not r or r[0] < 1 or any(b != 2 * a for a, b in pairwise(r)):
            raise UserError(
                f"model.resolutions {list(r)}: each level must be twice the one before, "
                "e.g. [8, 16, 32]"
            )
        if not 1 <= self.nbits <= 8:
            raise UserError(f"model.nbits must be from 1 to 8, got {self.nbits}")
        if self.dequantisation not in pixels.KINDS:
            raise UserError(
                f"model.dequantisation {self.dequantisation!r}: choose one of "
                f"{', '.join(pixels.KINDS)}"
            )
        if self.base not in BASES:
            raise UserError(f"model.base {self.base!r}: choose one of {', '.join(BASES)}")

    @property
    def finest(self) -> int:
        return self.resolutions[-1]

    @property
    def dims(self) -> int:
        return self.channels * self.finest**2


@dataclass(frozen=True)
class FieldConfig:
    """The velocity network of one level."""

    kind: str = "residual"
    """residual (the default) or paper (four 3×3 convolutions, softplus)."""
    width: int = 48
    """Channels of the hidden layers."""
    depth: int = 4
    """Residual blocks (the paper's field has a fixed depth)."""
    blocks: int = 1
    """Fields in sequence, each over its own t ∈ [0, 1]; flow matching takes 1."""
    scales: int = 1
    """More make the residual field a U: `depth` blocks at each scale on the way down and again on
    the way up, each scale twice as wide on half the side."""
    attention: bool = False
    """Self-attention after each block of the residual field's smallest scale."""

    def __post_init__(self) -> None:
        if self.kind not in velocity.FIELDS:
            raise UserError(f"field.kind {self.kind!r}: choose one of {', '.join(velocity.FIELDS)}")
        if min(self.width, self.depth, self.scales, self.blocks) < 1:
            raise UserError(
                "field.width, field.depth, field.scales and field.blocks must be at least 1"
            )
        if self.kind == "paper" and (self.scales > 1 or self.attention):
            raise UserError("field.scales and field.attention are the residual field's alone")


class Level(nn.Module):
    """One level: its coefficients, standardised, and the flow that models them.

    The base level's coefficients are its pixels in [0, 1], (N, C, R, R); another level's are
    the details (N, 3C, R/2, R/2), given the coarse image (N, C, R/2, R/2).

    Args:
        model: what the levels agree on; `finest` matters to Gaussian dequantisation only.
        resolution: the side of the images that this level produces.
    """

    mean: Tensor
    axes: Tensor
    std: Tensor
    coarse_mean: Tensor
    coarse_std: Tensor
    start: Tensor

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
                )
                for _ in range(self.field.blocks)
            ],
            name=f"level {resolution}",
        )
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("axes", torch.eye(channels))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.register_buffer("coarse_mean", torch.zeros(model.channels, 1, 1))
        self.register_buffer("coarse_std", torch.ones(model.channels, 1, 1))
        self.register_buffer("start", torch.zeros(()))

    @property
    def dims(self) -> int:
        return math.prod(self.shape)

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """This level's coefficients and coarse image from images x at any finer resolution.

        x: (N, C, H, W) in density units, H = W = R·2^k (or crops of such, down to 2^k·2).
        """
        times = int(math.log2(self.model.finest // self.resolution))
        x = haar.reduce(x, times)
        return (x, None) if self.is_base else haar.split(x)

    def standardise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients to flow units y, and log|det| (N,) of that map, in nats.

        y = axes·(values - mean) / std, channel by channel, with orthogonal axes.
        """
        log_det = values.new_zeros(len(values))
        if self.is_base and self.model.base == "logit":
            values, log_det = _logit(values)
        per_channel = math.prod(values.shape[2:])
        log_det = log_det - per_channel * self.std.log().sum()
        y = _mix(self.axes, values - self.mean) / self.std
        if self._starts_late():
            shrink = 1 - self.start
            return y * shrink, log_det + math.prod(y.shape[1:]) * shrink.log()
        return y, log_det

    def unstandardise(self, y: Tensor) -> Tensor:
        """The inverse of `standardise`: flow units to coefficients."""
        if self._starts_late():
            y = y / (1 - self.start)
        values = _mix(self.axes.T, y * self.std) + self.mean
        if self.is_base and self.model.base == "logit":
            return (values.sigmoid() - LOGIT_ALPHA) / (1 - 2 * LOGIT_ALPHA)
        return values

    def condition(self, coarse: Tensor | None) -> Tensor | None:
        """The coarse image in the units that the velocity network sees."""
        return None if coarse is None else (coarse - self.coarse_mean) / self.coarse_std

    @torch.no_grad()
    def fit_standardisation(self, x: Tensor) -> None:
        """Set mean, std and start from dequantised training images x."""
        values, coarse = self.coefficients(x)
        if self.is_base and self.model.base == "logit":
            values, _ = _logit(values)
        if self.model.whiten:
            channels = len(self.axes)
            covariance = torch.cov(values.movedim(1, 0).flatten(1).double())
            axes = torch.linalg.eigh(covariance.reshape(channels, channels)).eigenvectors.T
            # Of the two directions of an axis, the one that makes its largest entry positive.
            largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
            self.axes.copy_(axes * largest.sign())
        self._set_moments(self.mean, self.std, _mix(self.axes, values))
        self.mean.copy_(_mix(self.axes.T, self.mean[None])[0])
        if coarse is not None:
            self._set_moments(self.coarse_mean, self.coarse_std, coarse)
        if self._starts_late():
            # One noise level for all channels needs one scale for all channels.
            self.std.fill_(self.std.square().mean().sqrt())
            sigma = self._noise_std() / self.std.flatten()[0]
            self.start.copy_(sigma / (1 + sigma))

    @staticmethod
    def _set_moments(mean: Tensor, std: Tensor, values: Tensor) -> None:
        mean.copy_(values.mean((0, 2, 3))[:, None, None])
        std.copy_(values.std((0, 2, 3)).clamp_min(1e-4)[:, None, None])

    def _starts_late(self) -> bool:
        # Through a logit the dequantisation noise is not additive, so that base starts at 0.
        return self.model.dequantisation == "gaussian" and not (
            self.is_base and self.model.base == "logit"
        )

    def _noise_std(self) -> float:
        """Std of this level's share of Gaussian dequantisation noise, in density units.

        Each 2×2 mean halves the std of white noise; a detail is a sum of four, over c.
        """
        pixel = pixels.GAUSSIAN_STD / 2**self.model.nbits
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
        values, coarse = self.coefficients(x)
        y, log_det = self.standardise(values)
        result = self.flow.log_prob(
            y,
            self.condition(coarse),
            solver=solver or self.solver,
            trace=trace or self.trace,
            start=self.start_time,
            end=end,
            regularise=regularise,
            generator=generator,
        )
        result.log_prob = result.log_prob + log_det
        return result

    def bound(self, log_density: Tensor, log_q: Tensor) -> Tensor:
        """From this level's log-density to its share of the bound on log P: (N,) nats.

        The noise's log_q and the volume of the pixel cells are shared out by dimension, so the
        levels' bounds add up to `pixels.log_prob_of_integers` of the whole.
        """
        share = self.dims / self.model.dims
        return pixels.log_prob_of_integers(
            log_density, share * log_q, self.dims, self.model.nbits
        )

    @property
    def start_time(self) -> float:
        """The time of the data end: 0, or t_s with Gaussian dequantisation."""
        return float(self.start) if self._starts_late() else 0.0

    def generate(
        self, latent: Tensor, coarse: Tensor | None, solver: Solver | None = None
    ) -> Tensor:
        """Images (N, C, R, R) in density units from noise (N, *shape) and the coarse image."""
        y = self.flow.transport(
            latent,
            self.condition(coarse),
            backwards=True,
            solver=solver or self.solver,
            start=self.start_time,
        )
        values = self.unstandardise(y)
        return values if coarse is None else haar.merge(values, coarse)

    def encode(self, x: Tensor, solver: Solver | None = None) -> Tensor:
        """The latent of this level's coefficients of images x."""
        values, coarse = self.coefficients(x)
        y, _ = self.standardise(values)
        return self.flow.transport(
            y, self.condition(coarse), solver=solver or self.solver, start=self.start_time
        )


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


def _mix(matrix: Tensor, values: Tensor) -> Tensor:
    """A matrix (C, C) applied to the channels of (N, C, H, W)."""
    with torch.autocast(values.device.type, enabled=False):  # coefficients stay exact
        return torch.einsum("ij,njhw->nihw", matrix.to(values.dtype), values)


def _logit(x: Tensor) -> tuple[Tensor, Tensor]:
    """logit(α + (1-2α)x) and its log-determinant (N,) (Dinh et al. 2017, §4.1)."""
    squeezed = LOGIT_ALPHA + (1 - 2 * LOGIT_ALPHA) * x
    y = squeezed.logit()
    slope = math.log(1 - 2 * LOGIT_ALPHA) - squeezed.log() - (-squeezed).log1p()
    return y, slope.flatten(1).sum(1)


