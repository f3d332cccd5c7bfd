"""The split flow: squeeze, flow, shuffle, half of the channels leave, and again.

The multi-scale architecture of RealNVP (Dinh et al. 2017, §3.6), of flows of any kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrcnf.flows import shuffle as shuffles
from mrcnf.flows.base import Bridge, Flow, FlowResult, Leave, Step, bounded, log_normal
from mrcnf.flows.shuffle import Reordering, Shuffle
from mrcnf.flows.solve import Solver, Statistics
from mrcnf.flows.squeeze import Squeeze, squeeze, unsqueeze
from mrcnf.flows.trace import Trace

PRIORS = ("normal", "conditional")


@dataclass
class Split:
    """What a split does to the channels that come to it."""

    stays: Tensor
    """(N, C/2, H, W), goes on."""
    leaves: Tensor
    """(N, C/2, H, W), is noise by now: normal, element by element, with the following."""
    mean: Tensor
    log_std: Tensor
    penalty: Tensor | None = None
    """(N,): what the shuffle adds to the loss."""
    log_prob: Tensor | None = None
    """(N,): log-density of what stays, in nats, from the scales that follow (`split` alone)."""

    @property
    def noise(self) -> Tensor:
        """What leaves, as standard normal noise."""
        return (self.leaves - self.mean) * (-self.log_std).exp()


class MultiscaleFlow(Flow):
    """Flows of ever fewer channels on ever smaller sides, whatever their kind.

    `splits` times: squeeze, a flow, a shuffle, and half of the channels leave under their prior,
    standard normal or normal given those that stay; then squeeze once more and one more flow.
    The coarse image is squeezed with the first scale and averaged 2×2 for each further one.

    The latents have the places of what they were made of: put together again, half by half, and
    unsqueezed, they are shaped as y. What left under a conditional prior is in standard units.

    Args:
        make: a flow from the channels of its y and those of its coarse image.
        channels: of y.
        coarse_channels: of the coarse image, 0 for a base level.
        splits: how often channels leave, at least 1.
        shuffle: of `shuffle.SHUFFLES`.
        prior: of `PRIORS`.
        name: what to call this flow in messages.
    """

    def __init__(
        self,
        make: Callable[[int, int], Flow],
        channels: int,
        coarse_channels: int = 0,
        *,
        splits: int = 1,
        shuffle: str = "none",
        prior: str = "normal",
        name: str = "flow",
    ) -> None:
        super().__init__()
        self.name, self.splits = name, splits
        told = 4 * coarse_channels
        widths = [4 * channels * 2**i for i in range(splits + 1)]
        flows = [make(width, told) for width in widths]
        # After the flows, whose first weights then are the same under any shuffle and prior.
        gates = [_Gate(width, told, shuffle, prior) for width in widths[:-1]]
        self.flows, self.gates = nn.ModuleList(flows), nn.ModuleList(gates)
        self.tied_to_size = any(flow.tied_to_size for flow in flows)
        self.halvings = splits + 1 + max(flow.halvings for flow in flows)
        self.solved = any(flow.solved for flow in flows)
        self.reorders = any(gate.shuffle.measured for gate in gates)

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
        how = {"trace": trace, "end": end, "regularise": regularise, "generator": generator}
        scales = list(self._scales(y, condition, solver=solver, **how))
        results, dims = [result for result, _, _ in scales], y[0].numel()
        splits = [split for _, split, _ in scales if split is not None]
        kinetic, frobenius = (
            _sum([None if part is None else result.dims / dims * part
                  for result, part in zip(results, parts, strict=True)])
            for parts in ([r.kinetic for r in results], [r.frobenius for r in results])
        )  # fmt: skip
        return FlowResult(
            sum((own for _, _, own in scales), y.new_zeros(len(y))),
            dims,
            self.pack(results[-1].latent, [split.noise for split in splits]),
            sum((result.statistics for result in results), Statistics()),
            kinetic,
            frobenius,
            _sum([split.penalty for split in splits]),
        )

    def _scales(
        self, y: Tensor, condition: Tensor | None, **how: Any
    ) -> Iterator[tuple[FlowResult, Split | None, Tensor]]:
        """Each scale's flow's result, what leaves and stays (at the last one nothing does), and
        the scale's own part of the log-density (N,): its volume, and what leaves."""
        for i, told in enumerate(self._told(condition)):
            result = self._flow(i).log_prob(squeeze(y), told, **how)
            if i == self.splits:
                yield result, None, result.log_prob
                return
            split = self._gate(i)(result.latent, told)
            # The flow's density counts all of its latents as noise: of what goes on, that is yet
            # to be seen, and what leaves has a prior of its own.
            volume = result.log_prob - log_normal(result.latent)
            own = volume + log_normal(split.noise) - split.log_std.flatten(1).sum(1)
            yield result, split, own
            y = split.stays

    def transport(
        self,
        y: Tensor,
        condition: Tensor | None = None,
        *,
        backwards: bool = False,
        solver: Solver | None = None,
    ) -> Tensor:
        told = self._told(condition)
        if not backwards:
            left = []
            for i in range(self.splits):
                y = self._flow(i).transport(squeeze(y), told[i], solver=solver)
                split = self._gate(i)(y, told[i])
                left.append(split.noise)
                y = split.stays
            return self.pack(self._flow(-1).transport(squeeze(y), told[-1], solver=solver), left)
        y, left = self._unpacked(y)
        y = self._flow(-1).transport(y, told[-1], backwards=True, solver=solver)
        for i in reversed(range(self.splits)):
            y = self._gate(i).invert(unsqueeze(y), left[i], told[i])
            y = self._flow(i).transport(y, told[i], backwards=True, solver=solver)
        return unsqueeze(y)

    @torch.no_grad()
    def split(
        self,
        y: Tensor,
        condition: Tensor | None = None,
        *,
        solver: Solver | None = None,
        trace: Trace | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Split]:
        """What leaves and what stays at each split of y (N, C, H, W), the first one first."""
        found = list(
            self._scales(y, condition, solver=solver, trace=trace, generator=generator)
        )
        splits: list[Split] = []
        log_prob = torch.zeros(())
        for _, split, own in reversed(found):
            if split is not None:
                split.log_prob = log_prob
                splits.insert(0, split)
            log_prob = own + log_prob
        return splits

    @torch.no_grad()
    def initialise(
        self, y: Tensor, condition: Tensor | None = None, solver: Solver | None = None
    ) -> None:
        self._measure(y, condition, solver, first=True)

    @torch.no_grad()
    def reorder(
        self, y: Tensor, condition: Tensor | None = None, solver: Solver | None = None
    ) -> None:
        self._measure(y, condition, solver, first=False)

    def _measure(
        self, y: Tensor, condition: Tensor | None, solver: Solver | None, *, first: bool
    ) -> None:
        for i, told in enumerate(self._told(condition)):
            y = squeeze(y)
            if first:
                self._flow(i).initialise(y, told, solver)
            if i < self.splits:
                y = self._flow(i).transport(y, told, solver=solver)
                self._gate(i).shuffle.measure(y)
                y = self._gate(i)(y, told).stays

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
        how = {"trace": trace, "tolerance": tolerance}
        for i, told in enumerate(self._told(condition)):
            yield Squeeze()
            yield from self._flow(i).steps(told, solver, seed=seed + 1000 * i, **how)  # type: ignore[arg-type]
            if i < self.splits:
                yield from self._gate(i).steps(told)

    @torch.no_grad()
    def pieces(
        self, condition: Tensor | None = None, solver: Solver | None = None
    ) -> Iterator[Step | Bridge | Leave]:
        for i, told in enumerate(self._told(condition)):
            yield Squeeze()
            yield from self._flow(i).pieces(told, solver)
            if i < self.splits:
                yield from self._gate(i).steps(told)

    def compile(self, **options: Any) -> None:
        for flow in self.flows:
            flow.compile(**options)

    def hidden_weights(self) -> list[nn.Parameter]:
        return [w for i in range(len(self.flows)) for w in self._flow(i).hidden_weights()]

    def _flow(self, i: int) -> Flow:
        flow = self.flows[i]
        assert isinstance(flow, Flow)
        return flow

    def _gate(self, i: int) -> _Gate:
        gate = self.gates[i]
        assert isinstance(gate, _Gate)
        return gate

    def _told(self, condition: Tensor | None) -> list[Tensor | None]:
        """The coarse image as each scale is to see it."""
        if condition is None:
            return [None] * len(self.flows)
        told = [squeeze(condition)]
        for _ in range(self.splits):
            told.append(F.avg_pool2d(told[-1], 2))
        return [*told]

    @staticmethod
    def pack(rest: Tensor, left: list[Tensor]) -> Tensor:
        """The latents in one tensor shaped as y: the last flow's, and what left before, in turn."""
        for noise in reversed(left):
            rest = torch.cat((unsqueeze(rest), noise), 1)
        return unsqueeze(rest)

    def _unpacked(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        left, rest = [], squeeze(latent)
        for _ in range(self.splits):
            rest, noise = rest.chunk(2, dim=1)
            left.append(noise)
            rest = squeeze(rest)
        return rest, left


class _Gate(nn.Module):
    """A shuffle, and the prior of the half of the channels that leaves."""

    def __init__(self, channels: int, told: int, shuffle: str, prior: str) -> None:
        super().__init__()
        self.shuffle: Shuffle = shuffles.build(shuffle, channels, told)
        self.stays = channels // 2
        self.prior: nn.Conv2d | None = None
        if prior == "conditional":
            self.prior = nn.Conv2d(self.stays + told, channels, 3, padding=1)
            nn.init.zeros_(self.prior.weight)
            assert self.prior.bias is not None
            nn.init.zeros_(self.prior.bias)

    def forward(self, y: Tensor, told: Tensor | None) -> Split:
        y, penalty = self.shuffle(y, told)
        stays, leaves = y.chunk(2, dim=1)
        return Split(stays, leaves, *self.moments(stays, told), penalty)

    def invert(self, stays: Tensor, noise: Tensor, told: Tensor | None) -> Tensor:
        """The y of which so much stays, and of which so much noise has left."""
        mean, log_std = self.moments(stays, told)
        return self.shuffle.invert(torch.cat((stays, mean + noise * log_std.exp()), 1), told)

    def moments(self, stays: Tensor, told: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of what leaves, given what stays."""
        if self.prior is None:
            zeros = torch.zeros_like(stays)
            return zeros, zeros
        known = stays if told is None else torch.cat((stays, told), 1)
        mean, raw = self.prior(known).to(stays.dtype).chunk(2, dim=1)
        return mean, bounded(raw)

    def steps(self, told: Tensor | None) -> Iterator[Step | Leave]:
        if not isinstance(self.shuffle, shuffles.NoShuffle):
            yield Reordering(self.shuffle, told)

        def prior(stays: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return self.moments(stays, told)

        yield Leave(self.stays, prior)


def _sum(parts: list[Tensor | None]) -> Tensor | None:
    """The sum of what is there."""
    known = [part for part in parts if part is not None]
    return sum(known[1:], known[0]) if known else None
