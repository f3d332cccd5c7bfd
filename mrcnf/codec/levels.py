"""One level's coder: its noise, its lattice and its flow, on a stack."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from mrcnf.codec import lattice as lattices
from mrcnf.codec.ans import Stack
from mrcnf.codec.dequantisation import BentNoise
from mrcnf.codec.lattice import Lattice
from mrcnf.codec.settings import LevelSettings
from mrcnf.codec.steps import Code, Piece
from mrcnf.errors import UserError
from mrcnf.flows.base import Leave, Lift
from mrcnf.flows.solve import Solver
from mrcnf.model.level import Level

Key = tuple[int, ...]


class LevelCoder:
    """Codes a level's coefficients, given the coarse image.

    Args:
        bits: a pixel's cell has 2^bits sub-cells.

    Raises:
        UserError: the level takes the logit of its pixels, which no lattice goes along with.
    """

    def __init__(self, level: Level, settings: LevelSettings, bits: int) -> None:
        if level.units.logit:
            raise UserError(
                f"level {level.resolution} takes the logit of its pixels, which a codec's lattice "
                "cannot follow; train with model.base = affine"
            )
        self.level, self.settings, self.bits = level, settings, bits

    @cached_property
    def lattice(self) -> Lattice:
        """The lattice of its coefficients: one unit for all where a flow adds channels up."""
        level, finest = self.level, self.level.multiple
        y = torch.zeros(1, *level.latent_shape(finest, finest), dtype=level.dtype)
        condition = None
        if level.coarse_units is not None:
            channels = len(level.coarse_units.mean)
            condition = torch.zeros(1, channels, *y.shape[2:], dtype=level.dtype)
        sums = any(isinstance(piece, Lift | Leave) for piece in self._pieces(y, condition))
        return lattices.of_level(level, self.bits, even=sums)

    def condition(self, coarse: Tensor | None) -> Tensor | None:
        """What the flow is told of a coarse image in density units, in any precision."""
        return None if coarse is None else self.level.condition(coarse.to(self.level.dtype))

    def bends(self, integers: Tensor, condition: Tensor | None) -> BentNoise | None:
        """What learned noise does to sub-cells of these integers, if the level has any."""
        if self.level.learned_noise is None:
            return None
        bends = self.level.noise_bends(integers.to(self.level.dtype), condition)
        return BentNoise(bends, bool(self.level.learned_noise.pairs), self.bits)

    def push(self, stack: Stack, values: Tensor, condition: Tensor | None, key: Key) -> None:
        """Push coefficients, integers of the pyramid (N, C, H, W), int64."""
        state = self.lattice.enter(values)
        self._code.push(stack, state, self._pieces(values, condition), key)

    def pop(
        self, stack: Stack, shape: tuple[int, int, int, int], condition: Tensor | None, key: Key
    ) -> Tensor:
        """Pop the coefficients that `push` pushed."""
        blank = torch.empty(shape, dtype=self.level.dtype)
        state = self._code.pop(stack, shape, self._pieces(blank, condition), key)
        return self.lattice.leave(state)

    @property
    def _code(self) -> Code:
        lattice = self.lattice
        return Code(
            lattice, lattice.index(self.settings.sigma), self.settings.growth, self.level.dtype
        )

    def _pieces(self, y: Tensor, condition: Tensor | None) -> list[Piece]:
        """The flow in short steps, for values shaped as y."""
        own = self.settings
        solver = Solver(own.method, own.steps, own.spacing)
        return list(self.level.flow_of(y).pieces(condition, solver))
