"""A flow tied to one height and width, on larger inputs: tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mrcnf.flows.base import Flow, FlowResult, Step
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
            None if part is None else part.reshape(rows).mean(1)  # both are per dimension
            for part in (found.kinetic, found.frobenius)
        ]
        return FlowResult(
            found.log_prob.reshape(rows).sum(1), y.shape[1:].numel(),
            join(found.latent, y.shape), found.statistics, *means,
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
        return join(moved, y.shape)

    def steps(
        self,
        condition: Tensor | None = None,
        solver: Solver | None = None,
        *,
        trace: Trace | None = None,
        seed: int = 0,
        tolerance: float = 1e-6,
    ) -> Iterator[Step]:
        tiles = None if condition is None else cut(condition, self.side)
        found = self.flow.steps(tiles, solver, trace=trace, seed=seed, tolerance=tolerance)
        return (_TiledStep(step, self.side) for step in found)

    def compile(self, **options: Any) -> None:
        self.flow.compile(**options)

    def hidden_weights(self) -> list[nn.Parameter]:
        return self.flow.hidden_weights()


class _TiledStep(Step):
    def __init__(self, step: Step, side: int) -> None:
        self.step, self.side = step, side

    def forward(self, y: Tensor) -> Tensor:
        return join(self.step.forward(cut(y, self.side)), y.shape)

    def backward(self, z: Tensor) -> Tensor:
        return join(self.step.backward(cut(z, self.side)), z.shape)

    def log_scale(self, y: Tensor) -> Tensor:
        return join(self.step.log_scale(cut(y, self.side)), y.shape)


def cut(x: Tensor, side: int) -> Tensor:
    """(N, C, H, W) → (N·k, C, side, side), image by image, row by row."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // side, side, w // side, side).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def join(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `cut`: tiles to a tensor of the shape (N, C, H, W) that was cut."""
    n, c, h, w = shape
    side = tiles.shape[-1]
    grid = tiles.reshape(n, h // side, w // side, c, side, side)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(shape)
