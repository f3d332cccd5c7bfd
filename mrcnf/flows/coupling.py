"""The coupling flow: affine couplings with channel mixing between them (Kingma & Dhariwal 2018).

Exact densities in one pass, exact inverses in another; no solver, no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mrcnf import runtime
from mrcnf.flows.base import Flow, FlowResult, Leave, Lift, Step, bounded, log_normal
from mrcnf.flows.residual_blocks import ResidualBlocks, coarse_network, hidden_weights
from mrcnf.flows.solve import Solver, Statistics
from mrcnf.flows.squeeze import Squeeze, Unsqueeze, squeeze, unsqueeze
from mrcnf.flows.tangents import Dual, mix, normalise
from mrcnf.flows.trace import Trace


class CouplingFlow(Flow):
    """Couplings in sequence, conditional on the coarse image.

    Each normalises its input channel by channel, mixes the channels, and then scales and shifts
    one part of them by what a network makes of the other part and of the coarse image. One
    channel alone has no parts: it is squeezed to four first, and unsqueezed at the end.

    Args:
        channels: of y.
        coarse_channels: of the coarse image, 0 for a base level.
        couplings: how many.
        width, depth, scales, attention: of each one's network (`ResidualBlocks`).
        name: what to call this flow in messages.

    >>> flow = CouplingFlow(3, couplings=2, width=4, depth=1)      # no scale, no shift as yet
    >>> latent = flow.transport(torch.zeros(1, 3, 2, 2))
    >>> torch.equal(flow.transport(latent, backwards=True), torch.zeros(1, 3, 2, 2))
    True
    """

    solved = False

    def __init__(
        self,
        channels: int,
        coarse_channels: int = 0,
        *,
        couplings: int = 4,
        width: int = 48,
        depth: int = 2,
        scales: int = 1,
        attention: bool = False,
        name: str = "flow",
    ) -> None:
        super().__init__()
        self.name, self.tied_to_size = name, attention
        self.squeezes = channels == 1
        self.halvings = self.squeezes + scales - 1
        if self.squeezes:
            channels, coarse_channels = 4 * channels, 4 * coarse_channels
        self.couplings = nn.ModuleList(
            _Coupling(channels, width, depth, scales, attention) for _ in range(couplings)
        )
        told = [coupling.network.told for coupling in self]
        self.coarse = coarse_network(coarse_channels, width, sum(told)) if coarse_channels else None

    def __iter__(self) -> Iterator[_Coupling]:
        for coupling in self.couplings:
            assert isinstance(coupling, _Coupling)
            yield coupling

    def log_prob(
        self,
        y: Tensor,
        condition: Tensor | None = None,
        *,
        solver: Solver | None = None,
        trace: Trace | None = None,
        end: float = 1.0,
        regularise: bool = False,
        generator: torch.Generator | None = None,
    ) -> FlowResult:
        dims, log_det = y[0].numel(), y.new_zeros(len(y))
        y, told = self._enter(y, condition)
        for coupling, own in zip(self, told, strict=True):
            y, volume = coupling(y, own)
            log_det = log_det + volume
        latent = self._leave(y)
        return FlowResult(log_normal(y) + log_det, dims, latent, Statistics(evaluations=1))

    def transport(
        self,
        y: Tensor,
        condition: Tensor | None = None,
        *,
        backwards: bool = False,
        solver: Solver | None = None,
    ) -> Tensor:
        y, told = self._enter(y, condition)
        if backwards:
            for coupling, own in zip(reversed(list(self)), reversed(told), strict=True):
                y = coupling.invert(y, own)
        else:
            for coupling, own in zip(self, told, strict=True):
                y, _ = coupling(y, own)
        return self._leave(y)

    @torch.no_grad()
    def initialise(
        self, y: Tensor, condition: Tensor | None = None, solver: Solver | None = None
    ) -> None:
        """Activation normalisation: every coupling's input has mean 0 and variance 1 on y."""
        y, told = self._enter(y, condition)
        for coupling, own in zip(self, told, strict=True):
            coupling.shift.copy_(-y.mean((0, 2, 3))[:, None, None])
            # Of a single value there is no other than this standard deviation.
            several = y[:, 0].numel() > 1
            std = y.std((0, 2, 3), correction=int(several)).clamp_min(1e-3)
            coupling.log_scale.copy_(-std.log()[:, None, None])
            y, _ = coupling(y, own)

    @torch.no_grad()
    def steps(
        self,
        condition: Tensor | None = None,
        solver: Solver | None = None,
        *,
        trace: Trace | None = None,
        seed: int = 0,
        tolerance: float = 1e-6,
    ) -> Iterator[Step | Leave]:
        steps: list[Step] = [Squeeze()] if self.squeezes else []
        for coupling, own in zip(self, self._told(condition), strict=True):
            steps += [_Normalisation(coupling), _Mixing(coupling), _Affine(coupling, own)]
        return iter(steps + ([Unsqueeze()] if self.squeezes else []))

    def compile(self, **options: Any) -> None:
        for coupling in self:
            runtime.compile_methods(coupling, "forward", "invert", **options)
        if self.coarse is not None:
            runtime.compile_methods(self.coarse, "forward", **options)

    def hidden_weights(self) -> list[nn.Parameter]:
        found = [weight for coupling in self for weight in coupling.network.hidden_weights()]
        return [*found, *hidden_weights(self.coarse)]

    def _enter(self, y: Tensor, condition: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        return squeeze(y) if self.squeezes else y, self._told(condition)

    def _leave(self, y: Tensor) -> Tensor:
        return unsqueeze(y) if self.squeezes else y

    def _told(self, condition: Tensor | None) -> list[Tensor | None]:
        """What the coarse image tells each coupling's network."""
        if self.coarse is None or condition is None:
            return [None for _ in self]
        sizes = [coupling.network.told for coupling in self]
        told = self.coarse(squeeze(condition) if self.squeezes else condition)
        return list(told.split(sizes, dim=1))


class _Coupling(nn.Module):
    """Normalisation, mixing and an affine coupling, of a fixed number of channels.

    The mixing is a product of a unit upper and a unit lower triangular matrix and of a turn by
    which those that were kept change next. With the normalisation before it, that is any
    invertible matrix that needs no pivots; its determinant is 1.
    """

    def __init__(
        self, channels: int, width: int, depth: int, scales: int, attention: bool
    ) -> None:
        super().__init__()
        self.kept = channels // 2
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.upper = nn.Parameter(torch.zeros(channels, channels))
        self.lower = nn.Parameter(torch.zeros(channels, channels))
        changed = channels - self.kept
        self.network = Conditioner(self.kept, 2 * changed, width, depth, scales, attention)

    def forward(self, y: Tensor, told: Tensor | None) -> tuple[Tensor, Tensor]:
        """z and log|det| (N,)."""
        z = mix(self._mixing(), (y + self.shift) * self.log_scale.exp())
        kept, changed = z.tensor_split([self.kept], dim=1)
        log_scale, shift = self.affine(kept, told)
        volume = log_scale.flatten(1).sum(1) + y[0, 0].numel() * self.log_scale.sum()
        return torch.cat((kept, changed * log_scale.exp() + shift), 1), volume

    def invert(self, z: Tensor, told: Tensor | None) -> Tensor:
        kept, changed = z.tensor_split([self.kept], dim=1)
        log_scale, shift = self.affine(kept, told)
        y = torch.cat((kept, (changed - shift) * (-log_scale).exp()), 1)
        inverse = torch.linalg.inv(self._mixing().double()).to(y)
        return mix(inverse, y) * (-self.log_scale).exp() - self.shift

    def affine(self, kept: Tensor, told: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of the channels that change."""
        raw, shift = self.network(kept, told).to(kept.dtype).chunk(2, dim=1)
        return bounded(raw), shift

    def triangles(self) -> tuple[Tensor, Tensor]:
        """The unit upper and the unit lower triangular factor."""
        one = torch.eye(len(self.upper), dtype=self.upper.dtype, device=self.upper.device)
        return one + self.upper.triu(1), one + self.lower.tril(-1)

    def _mixing(self) -> Tensor:
        upper, lower = self.triangles()
        return (lower @ upper).roll(-self.kept, dims=0)


class Conditioner(ResidualBlocks):
    """What scales and shifts are made with; at first it answers 0."""

    @property
    def told(self) -> int:
        """Channels that a coarse image's network is to tell it."""
        return sum(self.widths)

    def forward(self, known: Tensor, told: Tensor | None) -> Tensor:
        maps = () if told is None else told.split(self.widths, dim=1)
        hidden = self.through(self.first(Dual(known).channels_last()), maps)
        return self.last(normalise(hidden).silu()).value


class _Normalisation(Step):
    def __init__(self, coupling: _Coupling) -> None:
        self.shift, self.scale = coupling.shift.detach(), coupling.log_scale.detach()

    def forward(self, y: Tensor) -> Tensor:
        return (y + self.shift) * self.scale.exp()

    def backward(self, z: Tensor) -> Tensor:
        return z * (-self.scale).exp() - self.shift

    def log_scale(self, y: Tensor) -> Tensor:
        return self.scale.expand_as(y)


class _Mixing(Lift):
    """Channel by channel: each is added to by channels that have their final or first value."""

    def __init__(self, coupling: _Coupling) -> None:
        self.turn = coupling.kept
        upper, lower = (factor.detach() for factor in coupling.triangles())
        self.upper, self.lower = upper.triu(1), lower.tril(-1)

    def lift(self, y: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        channels = list(y.unbind(1))
        for i in range(len(channels)):  # of the later channels, which have not changed yet
            self._add(channels, i, self.upper, rounded, 1)
        for i in reversed(range(len(channels))):  # of the earlier ones
            self._add(channels, i, self.lower, rounded, 1)
        return torch.stack(channels, 1).roll(-self.turn, dims=1)

    def drop(self, z: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        channels = list(z.roll(self.turn, dims=1).unbind(1))
        for i in range(len(channels)):
            self._add(channels, i, self.lower, rounded, -1)
        for i in reversed(range(len(channels))):
            self._add(channels, i, self.upper, rounded, -1)
        return torch.stack(channels, 1)

    def _add(
        self,
        channels: list[Tensor],
        i: int,
        matrix: Tensor,
        rounded: Callable[[Tensor], Tensor],
        sign: int,
    ) -> None:
        others = range(i) if matrix is self.lower else range(i + 1, len(channels))
        if len(others):
            # One by one and in order: a sum must not depend on how a library adds it up.
            offset = sum(matrix[i, j] * channels[j] for j in others)
            channels[i] = channels[i] + sign * rounded(offset)  # type: ignore[arg-type]


class _Affine(Step):
    def __init__(self, coupling: _Coupling, told: Tensor | None) -> None:
        self.coupling, self.told, self.kept = coupling, told, coupling.kept
        self._known: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @torch.no_grad()
    def _affine(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Of the channels that are kept; found once, as forward, scale and backward share them."""
        kept = y[:, : self.kept]
        if self._known is None or not torch.equal(self._known[0], kept):
            self._known = kept.clone(), self.coupling.affine(kept, self.told)
        return self._known[1]

    def forward(self, y: Tensor) -> Tensor:
        log_scale, shift = self._affine(y)
        return torch.cat((y[:, : self.kept], y[:, self.kept :] * log_scale.exp() + shift), 1)

    def backward(self, z: Tensor) -> Tensor:
        log_scale, shift = self._affine(z)
        changed = (z[:, self.kept :] - shift) * (-log_scale).exp()
        return torch.cat((z[:, : self.kept], changed), 1)

    def log_scale(self, y: Tensor) -> Tensor:
        log_scale, _ = self._affine(y)
        return torch.cat((torch.zeros_like(y[:, : self.kept]), log_scale), 1)
