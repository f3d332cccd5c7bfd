"""One lane of a file: its images onto a stack, and back."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrcnf import seeds
from mrcnf.codec import blocks, parts
from mrcnf.codec.ans import CodingError, Stack, Words
from mrcnf.codec.blocks import Block, Group, Size
from mrcnf.codec.contents import Stream, check_of
from mrcnf.codec.parts import Part
from mrcnf.codec.portable import portable as portably
from mrcnf.codec.pyramid import Failed, Pushed, Tick, coder_of, total, untold
from mrcnf.codec.ramp import PLAIN
from mrcnf.codec.settings import Settings
from mrcnf.data.imagefile import encode_png
from mrcnf.image import haar
from mrcnf.image.noise import dequantise, log_density
from mrcnf.model.level import likelihoods
from mrcnf.model.model import MultiResolutionFlow

WHOLE = 1 << 20
"""Pixels of the largest images whose bound is found as if they had not been cut."""


@dataclass(frozen=True)
class ToEncode:
    """Images for a lane, and what is to be done with them."""

    images: Sequence[Tensor]
    settings: Settings
    verify: bool
    bound: bool


@dataclass
class Lane:
    """A lane's streams, and what it took."""

    streams: list[Stream]
    """Coarsest first; their images are counted within the lane."""
    table: dict[str, Any]
    """What a decoder has to know of its blocks."""
    stored: dict[int, bytes]
    """Images that the model could not code, as PNG."""
    begun: int
    """Images that were coded less accurately, in part or as a whole."""
    padding: int = 0
    """Pixels that were coded beside those of the images."""
    dims: int = 0
    """Values of all parts at full accuracy."""
    spent: dict[int, float] = field(default_factory=dict)
    """Bits by level for those parts."""
    bound: float | None = None
    """The model's, in bits, on all images that are coded."""
    fine: float | None = None
    """And on those parts."""
    bound_seconds: float = 0.0


def encode(model: MultiResolutionFlow, job: ToEncode, tick: Tick) -> Lane:
    """Code a lane's images."""
    images, stored = job.images, dict[int, bytes]()
    with decoding(model, job.settings.portable) as own:
        # An image that cannot be coded is stored, and the rest coded again without it.
        while True:
            coded = [i not in stored for i in range(len(images))]
            attempt = _Attempt(own, job.settings, images, coded)
            try:
                attempt.run(tick, job.verify)
            except Failed as failure:
                for i in attempt.culprits(failure.members):
                    stored[i] = encode_png(images[i])
                continue
            break
    with decoding(model) as usual:
        attempt.model = usual  # whose bound it is, portable or not
        return attempt.lane(stored, job.bound)


@dataclass(frozen=True)
class ToDecode:
    """A lane's streams, coarsest level first, and what its images are to be."""

    streams: Sequence[Stream]
    table: Mapping[str, Any]
    """Of its blocks."""
    settings: Settings
    sizes: Sequence[Size]
    channels: Sequence[int]
    resolution: int | None = None


def decode(model: MultiResolutionFlow, job: ToDecode, tick: Tick) -> list[Tensor]:
    """The images that were coded into a lane's streams, uint8 (C, H, W).

    Raises:
        CodingError: into these none were.
    """
    with decoding(model, job.settings.portable) as own:
        return pop_images(own, job, tick)


def pop_images(model: MultiResolutionFlow, job: ToDecode, tick: Tick) -> list[Tensor]:
    """As `decode`, within `decoding`."""
    pieces = parts.cut(job.sizes, job.settings.rule)
    sizes = [part.size for part in pieces]
    found = blocks.groups(sizes, model.multiple)
    plan = blocks.cut(found, _integers(job.table.get("blocks")))
    rungs = _rungs(model, job.table.get("rungs"), len(plan))
    factor = model.config.finest // (job.resolution or model.config.finest)
    data = b"".join(stream.data for stream in reversed(job.streams))
    if len(data) % 4:
        raise CodingError("no whole number of words")
    stack = Stack(np.frombuffer(data, "<u4").astype(np.uint32))
    batches = coder_of(model, job.settings).pop(stack, plan, rungs, tick, job.resolution)
    small = [size.reduced(factor) for size in sizes]
    channels = [job.channels[part.image] for part in pieces]
    whole = [size.reduced(factor) for size in job.sizes]
    shapes = [(c, s.height, s.width) for c, s in zip(job.channels, whole, strict=True)]
    return parts.join(
        (
            (pieces[i], pixels)
            for block, batch in zip(plan, batches, strict=True)
            for i, pixels in blocks.scatter(batch, block, small, channels)
        ),
        shapes, factor,
    )  # fmt: skip


def _rungs(model: MultiResolutionFlow, table: object, blocks: int) -> dict[int, list[int]]:
    """The accuracy that every block was coded with, by resolution, or by 0 for all at once."""
    own = model.level(model.config.finest).pyramid.own_noise
    resolutions = model.resolutions if own else (0,)
    if not isinstance(table, dict) or set(table) != {str(r) for r in resolutions}:
        raise CodingError("no rungs of its levels")
    found = {r: _integers(table[str(r)]) for r in resolutions}
    if any(len(of) != blocks or not all(0 <= x <= PLAIN for x in of) for of in found.values()):
        raise CodingError("no rungs of its blocks")
    return found


def _integers(found: object) -> list[int]:
    if not isinstance(found, list) or not all(type(x) is int for x in found):
        raise CodingError("no list of integers")
    return found


@contextmanager
def decoding(model: MultiResolutionFlow, portable: bool = False) -> Iterator[MultiResolutionFlow]:
    """Within: the networks as encoder and decoder have to run them.

    On the CPU, in one thread, with nothing compiled or autocast, whatever they were before;
    `portable`, as all machines run them.
    """
    threads = torch.get_num_threads()
    training, device = model.training, model.device
    own = copy.deepcopy(model).cpu() if device.type != "cpu" else model
    own.eval()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), ExitStack() as stack:
            yield stack.enter_context(portably(own)) if portable else own
    finally:
        torch.set_num_threads(threads)
        model.train(training)


def reduced(image: Tensor, factor: int) -> Tensor:
    """An image as the integer pyramid has it, so many times smaller, its last rows repeated."""
    _, height, width = image.shape
    size = Size(height, width).padded(factor)
    x = blocks.gather([image], Block((0,), size), len(image))
    while factor > 1:
        _, x = haar.lift(x)
        factor //= 2
    return x[0].to(torch.uint8)


class _Attempt:
    """One run over the images that are to be coded.

    Args:
        coded: of all images, which.
    """

    def __init__(
        self,
        model: MultiResolutionFlow,
        settings: Settings,
        images: Sequence[Tensor],
        coded: Sequence[bool],
    ) -> None:
        self.model, self.settings = model, settings
        self.places = [i for i, wanted in enumerate(coded) if wanted]
        self.images = [images[i] for i in self.places]
        self.sizes = [Size(*image.shape[1:]) for image in self.images]
        self.parts = parts.cut(self.sizes, settings.rule)
        self.pixels = [part.of(self.images[part.image]) for part in self.parts]
        self.pushed = Pushed([], {}, [], {})
        self.streams: list[Stream] = []

    def run(self, tick: Tick, verify: bool) -> None:
        """Code the images, and decode them again.

        Raises:
            Failed: some cannot be coded, or do not come back; by their places among the coded.
        """
        if not self.images:
            return
        coder = coder_of(self.model, self.settings)
        stack = Stack(np.ones(3, np.uint32))
        groups = blocks.groups([part.size for part in self.parts], self.model.multiple)
        try:
            self.pushed = coder.push(stack, groups, self._gather, tick)
        except Failed as failure:
            raise Failed(self._whose(failure.members), failure) from failure
        self.streams = self._cut(stack.words())
        if not verify:
            return
        channels = [len(image) for image in self.images]
        job = ToDecode(self.streams, self.table(), self.settings, self.sizes, channels)
        every = range(len(self.images))
        try:
            found = pop_images(self.model, job, tick)
        except CodingError as error:
            raise Failed(every, error) from error
        if wrong := [i for i in every if not torch.equal(found[i], self.images[i])]:
            raise Failed(wrong, "it does not come back as it was")

    def table(self) -> dict[str, Any]:
        rungs = {str(resolution): found for resolution, found in self.pushed.rungs.items()}
        return {"blocks": [len(block.members) for block in self.pushed.blocks], "rungs": rungs}

    def lane(self, stored: dict[int, bytes], bound: bool) -> Lane:
        """What has become of it."""
        blocks, pixels = self.pushed.blocks, self.pixels
        members = [i for number in self._fine for i in blocks[number].members]
        begun = self._whose(set(range(len(pixels))) - set(members))
        lane = Lane(self.streams, self.table(), stored, len(begun))
        lane.padding = sum(block.pixels for block in blocks)
        lane.padding -= sum(image[0].numel() for image in self.images)
        lane.dims = sum(pixels[i].numel() for i in members)
        lane.spent = total(self.pushed.tallies[number].spent for number in self._fine)
        if bound:
            started = time.perf_counter()
            bounds = self._bounds(members)
            lane.fine = sum(bounds[i] for i in members)
            lane.bound = self._bound(bounds)
            lane.bound_seconds = time.perf_counter() - started
        return lane

    @cached_property
    def _fine(self) -> list[int]:
        """The blocks at full accuracy."""
        rungs = self.pushed.rungs.values()
        return [i for i in range(len(self.pushed.blocks)) if all(own[i] == 0 for own in rungs)]

    def _whose(self, members: Iterable[int]) -> list[int]:
        """The images, among the coded, that parts are of."""
        return sorted({self.parts[i].image for i in members})

    def _gather(self, block: Block) -> Tensor:
        return blocks.gather(self.pixels, block, self.model.config.channels)

    def _cut(self, words: Words) -> list[Stream]:
        """The streams, coarsest first; one word more than is needed shows that none is lacking."""
        streams, end = list[Stream](), len(words)
        finest = self.model.config.finest
        for resolution, cut in self.pushed.cuts.items():
            factor = finest // (resolution or finest)
            check = check_of(reduced(image, factor).numpy().tobytes() for image in self.images)
            start = min(end, max(0, cut - 1))
            data = words[start:end].astype("<u4").tobytes()
            streams.append(Stream(resolution, 0, len(self.images), data, check))
            end = start
        return streams

    def culprits(self, members: Sequence[int]) -> list[int]:
        """Which of all images keep these from being coded: those that fail alone, or all."""
        alone = [self.places[i] for i in members if not self._works_alone(i)]
        return alone or [self.places[i] for i in members]

    def _works_alone(self, image: int) -> bool:
        # On a stack that is deep enough for full accuracy.
        unit = self.model.multiple
        groups = [
            Group((i,), part.size.padded(unit))
            for i, part in enumerate(self.parts) if part.image == image
        ]  # fmt: skip
        dims = sum(group.size.height * group.size.width for group in groups)
        stack = Stack.deep(64 * dims * self.model.config.channels)
        coder = coder_of(self.model, self.settings)
        try:
            pushed = coder.push(stack, groups, self._gather, untold)
            found = coder.pop(stack, pushed.blocks, pushed.rungs, untold)
        except CodingError:
            return False
        own = [self._gather(block) for block in pushed.blocks]
        return all(map(torch.equal, found, own))

    # The model's bound, with the noise that images were coded with. What padding costs is in it.

    def _bound(self, bounds: Mapping[int, float]) -> float:
        """Of all images, in bits."""
        found = sum(
            bits for i, bits in bounds.items() if self.parts[i].image not in self._wholes
        )
        for image in self._wholes:
            size = self.sizes[image].padded(self.model.multiple)
            block = Block((image,), size)
            x = torch.empty(1, self.model.config.channels, size.height, size.width).double()
            for i, part in enumerate(self.parts):
                if part.image == image:
                    own = part.size.padded(self.model.multiple)
                    into = Part(0, part.top, part.left, own).of(x[0])
                    into.copy_(self._points[i])
            pixels = blocks.gather(self.images, block, self.model.config.channels)
            found += float(self._bits(x, pixels, (1, image)).sum())
        return found

    @cached_property
    def _wholes(self) -> set[int]:
        """The images that were cut and whose bound is that of the whole."""
        return {
            part.image for part in self.parts
            if part.size != (whole := self.sizes[part.image])
            and whole.height * whole.width <= WHOLE
        }  # fmt: skip

    def _bounds(self, members: Collection[int]) -> dict[int, float]:
        """Of these parts and all that are not of whole images, in bits."""
        found = dict[int, float]()
        wanted = {i for i, part in enumerate(self.parts) if part.image not in self._wholes}
        wanted.update(members)
        for number, block in enumerate(self.pushed.blocks):
            if not wanted.isdisjoint(block.members):
                x = torch.stack([self._points[i] for i in block.members])
                bits = self._bits(x, self._gather(block), (0, number))
                found.update(zip(block.members, bits.tolist(), strict=True))
        return found

    @cached_property
    def _points(self) -> dict[int, Tensor]:
        """The dequantised parts."""
        points = dict[int, Tensor]()
        for number, (block, tally) in enumerate(
            zip(self.pushed.blocks, self.pushed.tallies, strict=True)
        ):
            x = tally.point
            if x is None:  # coded without the model
                generator = seeds.generator(seeds.of_batch(0, number))
                x, _ = dequantise(
                    self._gather(block).to(torch.uint8), kind=self.model.config.pixel_noise,
                    generator=generator, dtype=torch.float64,
                )  # fmt: skip
            points.update(zip(block.members, x, strict=True))
        return points

    def _bits(self, x: Tensor, pixels: Tensor, key: tuple[int, int]) -> Tensor:
        """The bound (N,) on dequantised pixels."""
        x = x.to(self.model.level(self.model.config.finest).dtype)
        log_q = log_density(x * 256 - pixels, self.model.config.pixel_noise)
        generator = seeds.generator(seeds.of_batch(*key))
        found = likelihoods(self.model, x, log_q, generator=generator)
        nats = torch.stack([part.log_prob.double() for part in found.values()]).sum(0)
        return -nats / math.log(2)
