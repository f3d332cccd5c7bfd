"""The default velocity network: residual blocks, preconditioned by a spread of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mrcnf.flows import paths
from mrcnf.flows.lattice_features import Lattice
from mrcnf.flows.near_diagonal import NearDiagonal
from mrcnf.flows.residual_blocks import ResidualBlocks, coarse_network, hidden_weights
from mrcnf.flows.tangents import Dual, normalise
from mrcnf.flows.trace import Known
from mrcnf.flows.velocity import Field, Local


class ResidualField(ResidualBlocks, Field):
    """The default network: residual blocks, modulated by time and by the coarse image.

    Time, as features of log t/(1-t), scales and shifts every block; the coarse image goes
    through convolutions of its own, once per solve, and is added inside every block. The
    network answers with two numbers per coefficient, F and log q, and the velocity is

        f(t, y) = g·y + m·F,    v = α²q² + β²,    g = (αα'q² + ββ')/v,    m = W·q/√v

    (α, β, W of `paths`). g·y would be the best prediction of the velocity, and m what is left
    to predict, were y normal of standard deviation q: the preconditioning of Karras et al.
    (2022, §5) with a spread that the network finds for itself, as smooth patches and rough
    ones have details of very different size. F = log q = 0 transports a standard normal to
    itself.

    With several scales the blocks form a U: `depth` of them at each scale on the way down and
    again on the way up, at each scale twice as wide on half the side.

    Args:
        channels: of y.
        coarse_channels: of the coarse image, 0 for a base level.
        width: channels of the hidden layers at the full scale.
        depth: number of residual blocks, of two 3×3 convolutions each (at every scale, see above).
        scales: 1 works at full scale throughout.
        attention: self-attention over positions after each block of the smallest scale.
        path: of `paths.PATHS`, what the field is trained on.
        lattice: pixels per position, whose phases on the lattice of integers the field is to
            see (`lattice.Lattice`); 0 for none.
    """

    noise: Tensor
    near: NearDiagonal | None
    """A head that codecs and calibrated traces ask for the Jacobian; None until one is fitted."""

    def __init__(
        self,
        channels: int,
        coarse_channels: int = 0,
        width: int = 48,
        depth: int = 4,
        scales: int = 1,
        attention: bool = False,
        path: str = "straight",
        lattice: int = 0,
    ) -> None:
        super().__init__(
            channels + 2 * lattice, 2 * channels, width, depth, scales, attention
        )
        self.channels, self.path, self.halvings = channels, path, scales - 1
        self.lattice = Lattice(channels, coarse_channels, lattice) if lattice else None
        self.time = nn.Sequential(
            nn.Linear(TIME_FEATURES, 2 * width), nn.SiLU(),
            nn.Linear(2 * width, 2 * sum(self.widths)),
        )  # fmt: skip
        self.coarse = (
            coarse_network(coarse_channels, width, width + sum(self.widths))
            if coarse_channels
            else None
        )
        self.near = None
        self.register_buffer("noise", torch.zeros(channels, 1, 1))
        nn.init.zeros_(self.time[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.time[-1].bias)  # type: ignore[arg-type]

    def calibrate(self, noise: Tensor, cells: Tensor) -> None:
        self.noise.copy_(noise)
        if self.lattice is not None:
            self.lattice.calibrate(cells)

    def context(self, coarse: Tensor | None) -> Tensor | None:
        if self.coarse is None or coarse is None:
            return None
        maps = self.coarse(coarse)
        return maps if self.lattice is None else torch.cat((maps, coarse), 1)

    def run_parameters(self) -> list[Tensor]:
        return [p for name, p in self.named_parameters() if not name.startswith("coarse.")]

    def hidden_weights(self) -> list[nn.Parameter]:
        return [*super().hidden_weights(), *hidden_weights(self.coarse)]

    def run(self, t: Tensor, y: Dual, context: Tensor | None) -> Dual:
        gain, _, rest, _ = self._parts(t, y, context)
        return y * gain + rest

    def local(self, t: Tensor, y: Tensor, context: Tensor | None) -> Local:
        gain, log_spread, rest, features = (
            part.value for part in self._parts(t, Dual(y), context)
        )
        value = (y * gain + rest).to(y.dtype)
        if self.near is None:
            return Local(value, gain.to(y.dtype))
        time = time_features(t.to(y.dtype).reshape(-1))
        diagonal, _, neighbours = self.near(features, gain, log_spread, time)
        return Local(value, diagonal, neighbours)

    @property
    def knows_jacobian(self) -> bool:
        return self.near is not None

    def push_known(
        self, t: Tensor, y: Tensor, tangents: Tensor, context: Tensor | None
    ) -> Known:
        seen, rates = self.features(t, Dual(y, tangents), context)
        assert rates.tangents is not None and self.near is not None
        near = self.near(*seen)
        known = torch.stack([self.near.product(near, e) for e in tangents])
        trace = near[0].flatten(1).sum(1)
        return Known(*(part.to(y.dtype) for part in (rates.value, rates.tangents, known, trace)))

    def features(
        self, t: Tensor, y: Dual, context: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Dual]:
        """What `near` is given, and f(t, y)."""
        gain, log_spread, rest, features = self._parts(t, y, context)
        time = time_features(t.to(y.value.dtype).reshape(-1))
        return (features.value, gain.value, log_spread.value, time), y * gain + rest

    def new_near(self) -> NearDiagonal:
        """A head for this field, to be fitted; nothing uses it before it is `near`."""
        return NearDiagonal(self.width, self.channels, TIME_FEATURES)

    def _parts(
        self, t: Tensor, y: Dual, context: Tensor | None
    ) -> tuple[Dual, Dual, Dual, Dual]:
        """g, log q and m·F, and the features that they are made from."""
        t = t.to(y.value.dtype)
        y = y.channels_last()
        path = paths.at(self.path, t.reshape(-1, 1, 1, 1), self.noise)
        scales, shifts = self.time(time_features(t.reshape(-1)))[:, :, None, None].chunk(2, dim=1)
        coarse: Tensor | None = None
        maps: Sequence[Tensor] = ()
        if context is not None:
            used = self.width + sum(self.widths)
            coarse = context[:, used:]
            entry, *maps = context[:, :used].split([self.width, *self.widths], dim=1)
        seen = y.scale((path.alpha**2 + path.beta**2).rsqrt())
        if self.lattice is not None:
            seen = seen.cat(self.lattice(path, y, coarse))
        hidden = self.first(seen)
        if context is not None:
            hidden = hidden.shift(entry.to(hidden.value.dtype))
        hidden = self.through(
            hidden, maps, scales.split(self.widths, 1), shifts.split(self.widths, 1)
        )
        features = normalise(hidden).silu()
        answer, log_spread = self.last(features).chunk(2)
        gain, size = _precondition(path, log_spread)
        return gain, log_spread, answer * size, features

def _precondition(path: paths.Path, log_spread: Dual) -> tuple[Dual, Dual]:
    """g and m of `ResidualField` and their derivatives by log q."""
    alpha, beta, wronskian = path.alpha, path.beta, path.wronskian
    wild = log_spread.value.to(alpha.dtype)
    # Further out squares of variances leave the range of single precision.
    log_spread = log_spread.map(wild.clamp(-15, 15), lambda: (wild.abs() < 15).to(wild.dtype))
    variance = (2 * log_spread.value).exp()
    total = alpha**2 * variance + beta**2
    gain = (alpha * path.alpha_rate * variance + beta * path.beta_rate) / total
    size = wronskian * (variance / total).sqrt()
    return (
        log_spread.map(gain, lambda: -2 * alpha * beta * wronskian * variance / total / total),
        log_spread.map(size, lambda: size * beta**2 / total),
    )


TIME_FEATURES = 17
_TIME_EDGE = 1e-3


def time_features(t: Tensor) -> Tensor:
    """(N,) times → (N, 17): log t/(1-t), held constant outside [0, 1], and its harmonics."""
    t = t.clamp(0, 1)
    log_odds = ((t + _TIME_EDGE) / (1 - t + _TIME_EDGE)).log() / 7.0
    angles = log_odds[:, None] * (math.pi / 2) * torch.arange(1, 9, device=t.device, dtype=t.dtype)
    return torch.cat((log_odds[:, None], angles.sin(), angles.cos()), dim=1)
