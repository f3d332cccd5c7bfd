"""All levels of a model on one stack: what is popped and pushed, and when.

An *exact* pyramid has one noise, popped for the finest pixels. Its levels are pushed finest first,
each given the coarse image that is still at hand, so the decoder meets the base on top. A block of
images is done before the next begins.

In an *integer* pyramid every level is a model of integers by itself, with noise of its own: all
blocks' finest levels are pushed first, then the next, so that the coarse ones lie on top of the
stack and can be read alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from mrcnf.codec import dequantisation as noises
from mrcnf.codec import lifting, plain, ramp
from mrcnf.codec.ans import CodingError, Stack, Underflow
from mrcnf.codec.blocks import Block, Group
from mrcnf.codec.lattice import density_units
from mrcnf.codec.levels import LevelCoder
from mrcnf.codec.settings import Settings
from mrcnf.flows.solve import SolverError
from mrcnf.image import haar
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow

_NOISE, _FLOW = 0, 1
"""The last but one number of a level's keys."""

Tick = Callable[[int], object]
"""Is told of how many pixels more is done."""
Gather = Callable[[Block], Tensor]


class Failed(CodingError):
    """A block cannot be coded, or is not what was coded.

    Args:
        members: the images in it.
    """

    def __init__(self, members: Sequence[int], reason: object) -> None:
        self.members = tuple(members)
        super().__init__(self.members, str(reason))

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass
class Tally:
    """What a block took, and what was coded."""

    images: int
    rung: int
    spent: dict[int, float] = field(default_factory=dict)
    """Bits by level; noise is shared out by dimension."""
    point: Tensor | None = None
    """The dequantised images x (N, C, H, W) in density units; None without a model."""


@dataclass
class Pushed:
    """What was pushed on a stack."""

    blocks: list[Block]
    rungs: dict[int, list[int]]
    """Of the blocks, by resolution; 0 stands for all levels."""
    tallies: list[Tally]
    cuts: dict[int, int]
    """By resolution, coarsest first, how many words from the bottom a reader of its images can do
    without; 0 instead of a resolution where all levels are one."""


def untold(_: int) -> None:
    """A `Tick` for whoever does not wait."""


def total(tables: Iterable[Mapping[int, float]]) -> dict[int, float]:
    """Tables of numbers by level, added up."""
    found = dict[int, float]()
    for table in tables:
        for resolution, number in table.items():
            found[resolution] = found.get(resolution, 0.0) + number
    return found


class PyramidCoder(ABC):
    """Codes images with all levels of a model.

    Args:
        model: in evaluation mode, on the CPU.
    """

    def __init__(self, model: MultiResolutionFlow, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.noise, self.nbits = model.config.pixel_noise, model.config.nbits
        self._levels: dict[int, dict[int, LevelCoder]] = {}

    @abstractmethod
    def push(self, stack: Stack, found: Sequence[Group], gather: Gather, tick: Tick) -> Pushed:
        """Push all images of the groups.

        Args:
            gather: the images of a block, (N, C, H, W), int64.

        Raises:
            Failed: a block cannot be coded.
        """

    @abstractmethod
    def pop(
        self, stack: Stack, blocks: Sequence[Block], rungs: Mapping[int, Sequence[int]],
        tick: Tick, last: int | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Pop the blocks that `push` pushed, or their images at the resolution `last`.

        Raises:
            CodingError: these are not the words of such blocks.
        """

    def levels(self, rung: int) -> dict[int, LevelCoder]:
        """The coders of a rung by resolution, finest first."""
        if rung not in self._levels:
            own = ramp.at(self.settings, rung)
            self._levels[rung] = {
                level.resolution: LevelCoder(level, own.levels[level.resolution], own.bits)
                for level in reversed(list(self.model))
            }
        return self._levels[rung]

    def _checked(self, images: Tensor) -> Tensor:
        if not bool(((images >= 0) & (images < 1 << self.nbits)).all()):
            raise CodingError("pixels out of their range")
        return images

    def _shape(self, block: Block) -> tuple[int, int, int, int]:
        return len(block.members), self.model.config.channels, block.size.height, block.size.width


class ExactCoder(PyramidCoder):
    """For exact pyramids."""

    def push(self, stack: Stack, found: Sequence[Group], gather: Gather, tick: Tick) -> Pushed:
        slope, pushed = ramp.Ramp(), Pushed([], {0: []}, [], {})
        for group in found:
            done = 0
            while done < len(group.members):
                left = Block(group.members[done:], group.size)
                code = partial(self._push_some, left, gather, len(pushed.blocks))
                dims = self.model.config.channels * group.size.height * group.size.width
                most = min(len(left.members), group.most)
                count, rung, tally = slope.push(stack, code, dims, 1, most)
                pushed.blocks.append(left.first(count))
                pushed.rungs[0].append(rung)
                pushed.tallies.append(tally)
                done += count
                tick(left.first(count).pixels)
        pushed.cuts = {0: stack.low}
        return pushed

    def pop(
        self, stack: Stack, blocks: Sequence[Block], rungs: Mapping[int, Sequence[int]],
        tick: Tick, last: int | None = None,
    ) -> list[Tensor]:  # fmt: skip
        found = []
        numbered = list(enumerate(zip(blocks, rungs[0], strict=True)))
        for number, (block, rung) in reversed(numbered):
            found.append(self._pop(stack, block, number, rung))
            tick(block.pixels)
        return found[::-1]

    def _push_some(
        self, block: Block, gather: Gather, number: int, stack: Stack, count: int, rung: int
    ) -> Tally:
        own = block.first(count)
        with _naming(own.members):
            return self._push(stack, gather(own), number, rung)

    def _push(self, stack: Stack, images: Tensor, number: int, rung: int) -> Tally:
        tally = Tally(len(images), rung)
        if rung == ramp.PLAIN:
            plain.push_image(stack, images)
            return tally
        bits = ramp.at(self.settings, rung).bits
        before = stack.bits()
        noise = noises.pop(stack, self.noise, tuple(images.shape), bits)
        gained = (before - stack.bits()) / images.numel() - bits
        pixels = (images << bits) + noise
        tally.point = density_units(pixels, bits, 0, self.nbits)
        before = stack.bits()
        for halvings, (resolution, coder) in enumerate(self.levels(rung).items()):
            values, coarse = _parts(pixels, coder.level)
            condition = self._condition(coarse, coder, halvings)
            bends = None if halvings else coder.bends(images, condition)
            if bends is not None:
                noise = bends.apply(stack, noise, (number, resolution, _NOISE))
                values, _ = _parts((images << bits) + noise, coder.level)
            coder.push(stack, values, condition, (number, resolution, _FLOW))
            shared = values.numel() * (gained + coder.lattice.depth)
            tally.spent[resolution] = stack.bits() - before - shared
            before = stack.bits()
            if coarse is not None:
                pixels = coarse
        return tally

    def _pop(self, stack: Stack, block: Block, number: int, rung: int) -> Tensor:
        if rung == ramp.PLAIN:
            return self._checked(plain.pop_image(stack, self._shape(block)))
        pixels = condition = None
        for halvings, (resolution, coder) in reversed(list(enumerate(self.levels(rung).items()))):
            condition = self._condition(pixels, coder, halvings)
            shape = coder.level.latent_shape(block.size.height, block.size.width)
            key = (number, resolution, _FLOW)
            values = coder.pop(stack, (len(block.members), *shape), condition, key)
            pixels = values if pixels is None else lifting.unsums(values, pixels)
        assert pixels is not None
        images, noise = _split(pixels, coder.bits)
        self._checked(images)
        bends = coder.bends(images, condition)
        if bends is not None:
            noise = bends.undo(stack, noise, (number, resolution, _NOISE))
        noises.push(stack, self.noise, noise, coder.bits)
        return images

    def _condition(self, coarse: Tensor | None, coder: LevelCoder, halvings: int) -> Tensor | None:
        if coarse is None or coder.level.is_base:
            return None
        return coder.condition(density_units(coarse, coder.bits, halvings + 1, self.nbits))


class IntegerCoder(PyramidCoder):
    """For integer pyramids."""

    def push(self, stack: Stack, found: Sequence[Group], gather: Gather, tick: Tick) -> Pushed:
        # The finest level decides on the blocks.
        finest, *others = self.levels(0)
        slope, pushed, images = ramp.Ramp(), Pushed([], {finest: []}, [], {}), list[Tensor]()
        points: list[dict[int, Tensor]] = []
        for group in found:
            done = 0
            while done < len(group.members):
                left = Block(group.members[done:], group.size)
                count, point, coarse = self._push_block(
                    stack, slope, pushed, finest, left, gather, 1, group.most
                )
                pushed.blocks.append(left.first(count))
                points.append({finest: point})
                images.append(coarse)
                done += count
                tick(left.first(count).pixels)
        lows = {finest: stack.low}
        for resolution in others:
            stack.mark()
            pushed.rungs[resolution] = []
            for number, block in enumerate(pushed.blocks):
                whole = len(block.members)
                _, points[number][resolution], images[number] = self._push_block(
                    stack, slope, pushed, resolution, block, partial(_given, images[number]),
                    whole, whole,
                )  # fmt: skip
            lows[resolution] = stack.low
        # What a finer level left may have been popped from by a coarser one.
        least = stack.low
        for resolution in reversed(lows):
            least = pushed.cuts[resolution] = min(least, lows[resolution])
        for tally, parts in zip(pushed.tallies, points, strict=True):
            tally.point = self._assembled(parts)
        return pushed

    def pop(
        self, stack: Stack, blocks: Sequence[Block], rungs: Mapping[int, Sequence[int]],
        tick: Tick, last: int | None = None,
    ) -> list[Tensor]:  # fmt: skip
        images: list[Tensor | None] = [None] * len(blocks)
        last = last or self.model.config.finest
        for resolution in self.model.resolutions:
            numbered = list(enumerate(zip(blocks, rungs[resolution], strict=True)))
            for number, (block, rung) in reversed(numbered):
                images[number] = self._pop(
                    stack, resolution, images[number], block, number, rung
                )
                if resolution == last:
                    tick(block.pixels)
            if resolution == last:
                break
        return [found for found in images if found is not None]

    def _push_block(
        self, stack: Stack, slope: ramp.Ramp, pushed: Pushed, resolution: int, block: Block,
        gather: Gather, least: int, most: int,
    ) -> tuple[int, Tensor, Tensor]:  # fmt: skip
        """Push a level of as many of a block's images as can be: how many, their points, coarse."""
        number = len(pushed.rungs[resolution])
        before = stack.bits()

        def code(stack: Stack, count: int, rung: int) -> tuple[Tensor, Tensor]:
            own = block.first(count)
            with _naming(own.members):
                return self._push(stack, resolution, gather(own), number, rung)

        shape = self.model.level(resolution).latent_shape(block.size.height, block.size.width)
        limit = min(most, len(block.members))
        count, rung, (point, coarse) = slope.push(stack, code, math.prod(shape), least, limit)
        pushed.rungs[resolution].append(rung)
        if number == len(pushed.tallies):
            pushed.tallies.append(Tally(count, rung))
        pushed.tallies[number].spent[resolution] = stack.bits() - before
        return count, point, coarse

    def _push(
        self, stack: Stack, resolution: int, images: Tensor, number: int, rung: int
    ) -> tuple[Tensor, Tensor]:
        """The point that was pushed, of the level's coefficients, and what is still to be coded."""
        level = self.model.level(resolution)
        values, coarse = (images, images) if level.is_base else haar.lift(images)
        if rung == ramp.PLAIN:
            if level.is_base:
                plain.push_image(stack, images, level.halvings)
            else:
                plain.push_detail(stack, values, coarse, level.halvings)
            return (values.double() + 0.5) / 2**self.nbits, coarse
        coder = self.levels(rung)[resolution]
        condition = self._condition(coarse, coder)
        noise = noises.pop(stack, self.noise, tuple(values.shape), coder.bits)
        point = density_units((values << coder.bits) + noise, coder.bits, 0, self.nbits)
        bends = coder.bends(values, condition)
        if bends is not None:
            noise = bends.apply(stack, noise, (number, resolution, _NOISE))
        state = (values << coder.bits) + noise
        coder.push(stack, state, condition, (number, resolution, _FLOW))
        return point, coarse

    def _pop(
        self, stack: Stack, resolution: int, coarse: Tensor | None, block: Block, number: int,
        rung: int,
    ) -> Tensor:  # fmt: skip
        level = self.model.level(resolution)
        shape = (
            len(block.members), *level.latent_shape(block.size.height, block.size.width)
        )  # fmt: skip
        if rung == ramp.PLAIN:
            if coarse is None:
                return self._checked(plain.pop_image(stack, shape, level.halvings))
            detail = plain.pop_detail(stack, coarse, level.halvings)
            return self._checked(haar.unlift(detail, coarse))
        coder = self.levels(rung)[resolution]
        condition = None if coarse is None else self._condition(coarse, coder)
        state = coder.pop(stack, shape, condition, (number, resolution, _FLOW))
        values, noise = _split(state, coder.bits)
        images = self._checked(values if coarse is None else haar.unlift(values, coarse))
        bends = coder.bends(values, condition)
        if bends is not None:
            noise = bends.undo(stack, noise, (number, resolution, _NOISE))
        noises.push(stack, self.noise, noise, coder.bits)
        return images

    def _condition(self, coarse: Tensor, coder: LevelCoder) -> Tensor | None:
        if coder.level.is_base:
            return None
        return coder.condition((coarse.double() + 0.5) / 2**self.nbits)

    def _assembled(self, parts: Mapping[int, Tensor]) -> Tensor:
        """The images whose coefficients, by resolution, these are."""
        pyramid = self.model.level(self.model.config.finest).pyramid
        base, *finer = (parts[resolution] for resolution in self.model.resolutions)
        for details in finer:
            base = pyramid.up(details, base)
        return base


def coder_of(model: MultiResolutionFlow, settings: Settings) -> PyramidCoder:
    """The coder for a model's pyramid."""
    kind = IntegerCoder if model.level(model.config.finest).pyramid.own_noise else ExactCoder
    return kind(model, settings)


def _given(images: Tensor, _: Block) -> Tensor:
    return images


def _split(integers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Cells and sub-cells."""
    return integers >> bits, integers & (1 << bits) - 1


@contextmanager
def _naming(members: Sequence[int]) -> Iterator[None]:
    """Within: what goes wrong is said with the images that it is about."""
    try:
        yield
    except Underflow:
        raise
    except (CodingError, SolverError) as error:
        raise Failed(members, error) from error


def _parts(pixels: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
    return (pixels, None) if level.is_base else lifting.sums(pixels)
