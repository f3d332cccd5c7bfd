"""One level of the model: what it models, in which units, and with which flow.

Levels are named by the resolution that they produce: level 32 takes 16×16 to 32×32, the
coarsest level is the base. Levels share nothing. They know ratios of sizes only: a level of
images of any height and width is the same level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mrcnf import plugins, runtime
from mrcnf.errors import UserError
from mrcnf.flows.base import Flow, FlowResult
from mrcnf.flows.solve import Solver, Statistics
from mrcnf.flows.tiled import Tiled
from mrcnf.flows.trace import Trace
from mrcnf.image import pyramids
from mrcnf.image.bits import log_prob_of_integers
from mrcnf.image.learned_noise import Bends, LearnedNoise
from mrcnf.image.straight import floor
from mrcnf.model.building import build_flow, try_out
from mrcnf.model.settings import FieldConfig, FlowConfig, ModelConfig
from mrcnf.model.standardisation import Standardisation

INITIALISE_ON = 512
"""Images that a flow's own start is found on, at most."""

# Buffers and modules by the names that they had in files of earlier versions.
_RENAMED = {
    "mean": "units.mean",
    "axes": "units.axes",
    "std": "units.std",
    "coarse_mean": "coarse_units.mean",
    "coarse_std": "coarse_units.std",
    "dequantiser": "learned_noise",
}


class Level(nn.Module):
    """One level: its coefficients, standardised, and the flow that models them.

    The base level's coefficients are its pixels in [0, 1], (N, C, H, W); another level's are
    the details (N, 3C, H/2, W/2) of its images, given the coarse image (N, C, H/2, W/2).

    Args:
        model: what the levels agree on.
        resolution: the side of the images that this level produces.
    """

    noise: Tensor
    """(C, 1, 1): standard deviation of Gaussian dequantisation noise in y; else 0."""

    def __init__(
        self,
        model: ModelConfig,
        resolution: int,
        field: FieldConfig | None = None,
        solver: Solver | None = None,
        trace: Trace | None = None,
        flow: FlowConfig | None = None,
    ) -> None:
        super().__init__()
        if resolution not in model.resolutions:
            raise UserError(
                f"there is no level {resolution}: the levels are {list(model.resolutions)}"
            )
        self.model, self.resolution = model, resolution
        self.field, self.solver, self.trace, self.flow_config = (
            field or FieldConfig(),
            solver or Solver(),
            trace or Trace(),
            flow or FlowConfig(),
        )
        self.is_base = resolution == model.resolutions[0]
        self.halvings = model.resolutions[::-1].index(resolution)
        self.pyramid = pyramids.build(model.pyramid, model.nbits)
        self.channels = model.channels * (1 if self.is_base else 3)
        coarse_channels = 0 if self.is_base else model.channels
        side = resolution // (1 if self.is_base else 2)
        if self._seen_integers and self._through_logit:
            raise UserError(
                f"level {resolution}: a logit bends the lattice of integers; set "
                "model.base = affine or field.lattice = false there"
            )
        self.flow = build_flow(
            self.flow_config,
            self.field,
            self.channels,
            coarse_channels,
            lattice=self._seen_integers,
            name=f"level {resolution}",
        )
        if side % 2**self.flow.halvings:
            raise UserError(
                f"level {resolution} works on {side}×{side} positions, which cannot be halved "
                f"{self.flow.halvings} times; lower flow.splits or field.scales"
            )
        for kind in (self.flow_config.kind, self.field.kind):
            if plugins.is_own(kind):
                try_out(self.flow, kind, self.channels, coarse_channels, side)
        self.learned_noise = None
        if model.dequantisation == "variational" and self.pyramid.learns_noise(self.halvings):
            pairs = 0 if self.is_base or self.pyramid.own_noise else model.channels
            self.learned_noise = LearnedNoise(self.channels, coarse_channels, pairs)
        self.units = Standardisation(self.channels, logit=self._through_logit)
        self.coarse_units = None if self.is_base else Standardisation(model.channels, turned=False)
        self.register_buffer("noise", torch.zeros(self.channels, 1, 1))
        self.coding: dict[str, Any] = {}
        """How a codec was found to code this level best; it takes no part in the model."""
        self.register_load_state_dict_pre_hook(_rename)

    @property
    def multiple(self) -> int:
        """What height and width of the finest images must be multiples of, for this level.

        A field that is tied to its size serves larger images in tiles of that size.
        """
        if self.flow.tied_to_size:
            return self.model.finest
        return 2 ** (self.halvings + (not self.is_base) + self.flow.halvings)

    @property
    def device(self) -> torch.device:
        return self.noise.device

    @property
    def dtype(self) -> torch.dtype:
        return self.noise.dtype

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape of one image's coefficients, if the finest image has this height and width."""
        factor = 2 ** (self.halvings + (not self.is_base))
        return self.channels, height // factor, width // factor

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """This level's coefficients and coarse image from images at the finest resolution.

        Args:
            x: (N, C, H, W) in density units, whole images or crops, H and W multiples of
                `multiple`.
        """
        x = self.pyramid.coarsen(x, self.halvings)
        return (x, None) if self.is_base else self.pyramid.down(x)

    def standardise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients to flow units y, and log|det| (N,) of that map, in nats."""
        return self.units(values)

    def condition(self, coarse: Tensor | None) -> Tensor | None:
        """The coarse image as the velocity network sees it."""
        if coarse is None or self.coarse_units is None:
            return None
        return self.coarse_units(self.pyramid.known(coarse))[0]

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
        if self.learned_noise is None:
            y, log_det = self.standardise(values)
            return y, condition, log_det
        # The noise is the coefficients' own, or that of the finest pixels.
        cells = (values if self.pyramid.own_noise else x) * 2**self.model.nbits
        integers = floor(cells)
        noise, log_rise = self.learned_noise(
            cells - integers, self._of_cells(integers + 0.5)[0], condition
        )
        y, log_det = self._of_cells(integers + noise)
        return y, condition, log_det + log_rise

    def _of_cells(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Flow units and log|det| from what has learned noise, in cells."""
        found = cells / 2**self.model.nbits
        return self.standardise(
            found if self.pyramid.own_noise else self.coefficients(found)[0]
        )

    def noise_bends(self, integers: Tensor, condition: Tensor | None) -> Bends:
        """How the learned noise bends noise in the cells of these integers: `LearnedNoise.bends`.

        Args:
            integers: the coefficients' own, or the finest pixels where they have the noise.
        """
        assert self.learned_noise is not None
        return self.learned_noise.bends(self._of_cells(integers + 0.5)[0], condition)

    @torch.no_grad()
    def fit_standardisation(self, x: Tensor, *, anew: bool = True) -> None:
        """Set the units from dequantised training images x, and tell the flow.

        Args:
            anew: find axes as well, and what the flow starts from; False keeps those there are,
                of a level that is trained.
        """
        values, coarse = self.coefficients(x)
        self.units.fit(values, whiten=anew and self.model.whiten)
        if self.coarse_units is not None and coarse is not None:
            self.coarse_units.fit(self.pyramid.known(coarse))
        if self.noisy:
            # A channel of nothing but noise has no path to follow; this leaves it one.
            std = self.pyramid.noise_std(self.halvings, self.is_base)
            self.noise.copy_((std / self.units.std).clamp(max=0.9))
        self.flow.calibrate(self.noise, self._cells())
        if anew:
            y, condition, _ = self.prepare(x[:INITIALISE_ON])
            self.flow.initialise(y, condition, self.solver)

    @torch.no_grad()
    def reorder(self, x: Tensor) -> None:
        """Have the flow measure its orders on dequantised training images x."""
        y, condition, _ = self.prepare(x)
        self.flow.reorder(y, condition, self.solver)

    @property
    def noisy(self) -> bool:
        """Whether the data are clean coefficients with Gaussian noise, `noise` in flow units.

        Through a logit the noise is not additive: there it is part of the data.
        """
        return self.model.dequantisation == "gaussian" and not self._through_logit

    @property
    def _through_logit(self) -> bool:
        return self.is_base and self.model.base == "logit"

    @property
    def _seen_integers(self) -> int:
        """How many integers at each position (see `_cells`) the field is to see."""
        each = self.pyramid.integers(self.halvings, self.is_base) if self.field.lattice else 0
        return each * self.model.channels

    def _cells(self) -> Tensor:
        """The integers at one position from its y, coarse image and 1: see `Field.calibrate`."""
        coarse_channels = 0 if self.coarse_units is None else len(self.coarse_units.mean)
        size = self.channels + coarse_channels
        probes = torch.cat((torch.eye(size), torch.zeros(1, size))).to(self.noise)[..., None, None]
        values, coarse = self.units.invert(probes[:, : self.channels]), None
        if self.coarse_units is not None:
            coarse = self.coarse_units.invert(probes[:, self.channels :])
        cells = self.pyramid.cells(values, coarse).flatten(1) * 2**self.model.nbits - 0.5
        return torch.cat((cells[:-1] - cells[-1], cells[-1:])).T

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
        """Log-density of this level's coefficients of images x, as `Flow.log_prob`."""
        y, condition, log_det = self.prepare(x)
        result = self.flow_of(y).log_prob(
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

    def bound(self, result: FlowResult, x: Tensor, log_q: Tensor) -> Tensor:
        """This level's share of the bound on log P, (N,) nats, from its `log_prob` of images x.

        The noise's log_q and the volume of the pixel cells are shared out by dimension, so the
        levels' bounds add up to `bits.log_prob_of_integers` of the whole.
        """
        share = result.dims / x.shape[1:].numel()
        return log_prob_of_integers(
            result.log_prob, share * log_q, result.dims, self.model.nbits
        )

    def generate(
        self, latent: Tensor, coarse: Tensor | None, solver: Solver | None = None
    ) -> Tensor:
        """Images in density units from noise (`latent_shape`) and the coarse image."""
        y = self.flow_of(latent).transport(
            latent, self.condition(coarse), backwards=True, solver=solver or self.solver
        )
        values = self.units.invert(y)
        return values if coarse is None else self.pyramid.up(values, coarse)

    def encode(self, x: Tensor, solver: Solver | None = None) -> Tensor:
        """The latent of this level's coefficients of images x."""
        y, condition, _ = self.prepare(x)
        return self.flow_of(y).transport(y, condition, solver=solver or self.solver)

    def flow_of(self, y: Tensor) -> Flow:
        """The flow, in tiles where it is tied to another size than y's."""
        *_, side = self.latent_shape(self.model.finest, self.model.finest)
        if self.flow.tied_to_size and tuple(y.shape[2:]) != (side, side):
            return Tiled(self.flow, side)
        return self.flow

    def compile(self, **options: Any) -> None:
        """Compile the networks with torch.compile, for every objective and for evaluation."""
        self.flow.compile(**options)
        if self.learned_noise is not None:
            runtime.compile_methods(self.learned_noise, "forward", **options)


def check_size(levels: Iterable[Level], size: Sequence[int], remedy: str = "") -> None:
    """A UserError unless the levels can make images of this height and width."""
    height, width = size
    unit = max(level.multiple for level in levels)
    if height < 1 or width < 1 or height % unit or width % unit:
        raise UserError(
            f"images of {height}×{width}: this model's have sides that are positive multiples of "
            f"{unit}{remedy}"
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
    levels = list(levels)
    check_size(levels, x.shape[2:])
    result = {}
    for level in levels:
        own = solver.get(level.resolution) if isinstance(solver, Mapping) else solver
        flow = level.log_prob(x, solver=own, trace=trace, generator=generator)
        bound = level.bound(flow, x, log_q)
        result[level.resolution] = LevelLikelihood(bound, flow.statistics)
    return result


def _rename(level: Level, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the entries of a state_dict of earlier versions their present names."""
    for key in [key for key in state if key.startswith(prefix)]:
        old, dot, rest = key.removeprefix(prefix).partition(".")
        if old not in _RENAMED:
            continue
        value, new = state.pop(key), _RENAMED[old] + dot + rest
        if not (level.coarse_units is None and new.startswith("coarse_units")):
            state[prefix + new] = value
