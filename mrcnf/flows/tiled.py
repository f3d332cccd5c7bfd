"""A flow tied to one height and width, on larger inputs: tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mrcnf.flows.base import Bridge, Flow, FlowResult, Leave, Lift, Sight, Step
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace


class Tiled(Flow):
    """Independent tiles of side × side positions, each given its tile of the condition.

    A flow of larger inputs by itself, whose log-density is the sum of the tiles'.

    Args:
        flow: that serves at side × side positions alone.
        side: of which heights and widths here are multiples.
    """

    def __init__(self, flow: Flow, side: int) -> None:
        super().__init__()
        self.flow, self.side, self.name = flow, side, flow.name
        self.solved = flow.solved

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
        found = self.flow.log_prob(
            cut(y, self.side),
            None if condition is None else cut(condition, self.side),
            solver=solver,
            trace=trace,
            end=end,
            regularise=regularise,
            generator=generator,
        )
        rows = (len(y), -1)
        means = [
            None if part is None else part.reshape(rows).mean(1)  # all are per dimension
            for part in (found.kinetic, found.frobenius, found.penalty)
        ]
        return FlowResult(
            found.log_prob.reshape(rows).sum(1), y.shape[1:].numel(),
            join(found.latent, y.shape, self.side), found.statistics, *means,
        )  # fmt: skip

    def transport(
        self,
        y: Tensor,
        condition: Tensor | None = None,
        *,
        backwards: bool = False,
        solver: Solver | None = None,
    ) -> Tensor:
        tiles = None if condition is None else cut(condition, self.side)
        moved = self.flow.transport(cut(y, self.side), tiles, backwards=backwards, solver=solver)
        return join(moved, y.shape, self.side)

    def steps(
        self,
        condition: Tensor | None = None,
        solver: Solver | None = None,
        *,
        trace: Trace | None = None,
        seed: int = 0,
        tolerance: float = 1e-6,
    ) -> Iterator[Step | Leave]:
        tiles = None if condition is None else cut(condition, self.side)
        found = self.flow.steps(tiles, solver, trace=trace, seed=seed, tolerance=tolerance)
        for piece in self._tiled(found):
            assert not isinstance(piece, Bridge)
            yield piece

    def pieces(
        self, condition: Tensor | None = None, solver: Solver | None = None
    ) -> Iterator[Step | Bridge | Leave]:
        tiles = None if condition is None else cut(condition, self.side)
        return self._tiled(self.flow.pieces(tiles, solver))

    def _tiled(self, pieces: Iterator[Step | Bridge | Leave]) -> Iterator[Step | Bridge | Leave]:
        side = self.side
        for piece in pieces:
            if isinstance(piece, Leave):
                yield Leave(piece.stays, partial(_prior, piece, side))
            elif isinstance(piece, Bridge):
                yield _TiledBridge(piece, side)
            else:
                tiled = (_TiledLift if isinstance(piece, Lift) else _TiledStep)(piece, side)
                yield tiled
                side = tiled.after

    def compile(self, **options: Any) -> None:
        self.flow.compile(**options)

    def hidden_weights(self) -> list[nn.Parameter]:
        return self.flow.hidden_weights()


class _TiledStep(Step):
    """A step of tiles: of side × side positions before it, of `after` × `after` behind it."""

    def __init__(self, step: Step, side: int) -> None:
        self.step, self.side, self.after = step, side, round(side / step.shrink)
        self.kept, self.shrink = step.kept, step.shrink

    def forward(self, y: Tensor) -> Tensor:
        return join(self.step.forward(cut(y, self.side)), y.shape, self.side)

    def backward(self, z: Tensor) -> Tensor:
        return join(self.step.backward(cut(z, self.after)), z.shape, self.after)

    def log_scale(self, y: Tensor) -> Tensor:
        return join(self.step.log_scale(cut(y, self.side)), y.shape, self.side)


class _TiledLift(_TiledStep, Lift):
    """The same of a step that is exact on any lattice."""

    step: Lift

    def lift(self, y: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return join(self.step.lift(cut(y, self.side), rounded), y.shape, self.side)

    def drop(self, z: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return join(self.step.drop(cut(z, self.after), rounded), z.shape, self.after)


def _prior(leave: Leave, side: int, stays: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_std = leave.prior(cut(stays, side))
    return join(mean, stays.shape, side), join(log_std, stays.shape, side)


class _TiledBridge(Bridge):
    def __init__(self, bridge: Bridge, side: int) -> None:
        self.bridge, self.side, self.t = bridge, side, bridge.t

    def ahead(self, x: Tensor) -> Sight:
        return self._whole(self.bridge.ahead(cut(x, self.side)), x.shape)

    def behind(self, z: Tensor) -> Sight:
        return self._whole(self.bridge.behind(cut(z, self.side)), z.shape)

    def rise(self, y: Tensor) -> Tensor:
        return join(self.bridge.rise(cut(y, self.side)), y.shape, self.side)

    def _whole(self, sight: Sight, shape: torch.Size) -> Sight:
        # Couplings of tiles of odd sides would not be those of one chequerboard.
        return Sight(join(sight.y, shape, self.side), join(sight.half, shape, self.side))


def cut(x: Tensor, side: int) -> Tensor:
    """(N, C, H, W) → (N·k, C, side, side), image by image, row by row."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // side, side, w // side, side).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def join(tiles: Tensor, shape: torch.Size, side: int) -> Tensor:
    """Put tiles in the places of those of side × side that a tensor (N, C, H, W) was cut into.

    Tiles that were not changed in shape give the inverse of `cut`.
    """
    n, _, h, w = shape
    c, new = tiles.shape[1:3]
    grid = tiles.reshape(n, h // side, w // side, c, new, new)
    joined = grid.permute(0, 3, 1, 4, 2, 5)
    return joined.reshape(n, c, h // side * new, w // side * new)
