"""From images to the bytes of a file."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mrcnf import seeds
from mrcnf.codec import ans, blocks, container
from mrcnf.codec.ans import CodingError, Stack, Words
from mrcnf.codec.blocks import Block, Group, Size
from mrcnf.codec.contents import Contents, Entry, Stream, check_of
from mrcnf.codec.decoder import decoding, pop_images, reduced
from mrcnf.codec.identity import identity
from mrcnf.codec.pyramid import Failed, Pushed, coder_of
from mrcnf.codec.settings import Settings, default, with_steps
from mrcnf.data.imagefile import encode_png
from mrcnf.errors import UserError
from mrcnf.image.noise import dequantise, log_density
from mrcnf.model.level import likelihoods
from mrcnf.model.model import MultiResolutionFlow


@dataclass(frozen=True)
class Coded:
    """A compressed file, and what it took."""

    data: bytes
    images: int
    stored: int
    """Images that lie in the file as PNG, as the model could not code them."""
    bits_per_dim: float
    """Of the file, all included."""
    bound: float | None
    """The model's, bits per dimension, with the noise that the images were coded with."""
    overhead_percent: float | None
    """Of the file over the bound: steps, header, and what it takes to begin."""
    seconds: float
    """For all of this, with the decoding that shows that the file is right."""
    begun: int
    """Images that were coded less accurately, as a file has no bits to begin with."""
    levels: dict[int, float]
    """Of the other images alone, bits per dimension by level."""
    excess_percent: float | None
    """Of the other images alone, over the bound."""

    def table(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        numbers = {name: value for name, value in vars(self).items() if name != "data"}
        levels = [{"resolution": r, "bits_per_dim": bits} for r, bits in self.levels.items()]
        return {"bytes": len(self.data), **numbers, "levels": levels}

    def __str__(self) -> str:
        stored = f" ({self.stored:,} of them as PNG)" if self.stored else ""
        promise = ""
        if self.bound is not None and self.overhead_percent is not None:
            promise = f" where the model promises {self.bound:.4f}: {self.overhead_percent:+.2f}%"
        return (
            f"{self.images:,} images{stored} in {len(self.data):,} bytes, "
            f"{self.bits_per_dim:.4f} bits/dim{promise}, {self.seconds:.1f} s"
        )


def encode(
    model: MultiResolutionFlow,
    images: Sequence[Tensor] | Tensor,
    *,
    names: Sequence[str] | None = None,
    steps: int | None = None,
    settings: Settings | None = None,
    portable: bool = False,
    verify: bool = True,
    bound: bool = True,
    progress: bool = False,
) -> Coded:
    """Code images without loss.

    Args:
        model: of any flow; images of its number of channels, or grey ones if it has three.
        images: uint8 (C, H, W) each, of any sizes, or (N, C, H, W).
        names: one for each, of files; none by default.
        steps: of the finest level's flow: more take longer and come closer to the bound.
        settings: all about the code; by default those that suit most models.
        portable: let every machine and version decode it, which takes longer.
        verify: decode the file and store as PNG what should not come back as it was.
        bound: find the model's bound on the same noise, too.

    Raises:
        UserError: images or settings that the model cannot have, names that clash.
    """
    started = time.perf_counter()
    ans.require()
    images = _checked(model, images)
    names = [""] * len(images) if names is None else list(names)
    if len(names) != len(images):
        raise UserError(f"{len(images)} images and {len(names)} names: give each image one")
    if settings is None:
        settings = default(model)
    if steps is not None:
        settings = with_steps(settings, steps)
    settings = replace(settings, portable=portable or settings.portable)
    stored = dict[int, bytes]()
    with decoding(model, settings.portable) as own:
        # An image that cannot be coded is stored, and the rest coded again without it.
        while True:
            attempt = _Attempt(own, settings, images, [i not in stored for i in range(len(images))])
            try:
                attempt.run(progress, verify)
            except Failed as failure:
                for i in attempt.culprits(failure.members):
                    stored[i] = encode_png(images[i])
                continue
            break
    with decoding(model) as own:
        bounds = attempt.bounds(own) if bound else None
    entries = tuple(
        Entry(name, image.shape[1], image.shape[2], len(image), stored.get(i))
        for i, (name, image) in enumerate(zip(names, images, strict=True))
    )
    data = container.pack(
        Contents(identity(model), attempt.table(), entries, tuple(attempt.streams))
    )
    dims = sum(image.numel() for image in images)
    promised, overhead = _over_bound(8 * len(data), bounds, stored, dims)
    begun, levels, excess = attempt.accurate(bounds)
    return Coded(
        data, len(images), len(stored), 8 * len(data) / max(1, dims), promised, overhead,
        time.perf_counter() - started, begun, levels, excess,
    )  # fmt: skip


def _over_bound(
    bits: int, bounds: list[float] | None, stored: dict[int, bytes], dims: int
) -> tuple[float | None, float | None]:
    """The bound in bits per dimension, and what the file has over it, in percent."""
    if bounds is None or not dims:
        return None, None
    # An image that the model cannot code is as large as it is.
    total = sum(bounds) + 8 * sum(map(len, stored.values()))
    return total / dims, 100 * (bits / total - 1)


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
        self.pushed = Pushed([], {}, [], {})
        self.streams: list[Stream] = []

    def run(self, progress: bool, verify: bool) -> None:
        """Code the images, and decode them again.

        Raises:
            Failed: some cannot be coded, or do not come back.
        """
        if not self.images:
            return
        coder = coder_of(self.model, self.settings)
        stack = Stack(np.ones(3, np.uint32))
        with tqdm(total=len(self.images), desc="encoding", disable=not progress) as bar:
            groups = blocks.groups(self.sizes, self.model.multiple)
            self.pushed = coder.push(stack, groups, self._gather, bar.update)
        self.streams = self._cut(stack.words())
        if not verify:
            return
        every = range(len(self.images))
        try:
            found = pop_images(
                self.model, self.table(), self.streams, self.sizes,
                [len(image) for image in self.images], progress=progress,
            )  # fmt: skip
        except CodingError as error:
            raise Failed(every, error) from error
        if wrong := [i for i in every if not torch.equal(found[i], self.images[i])]:
            raise Failed(wrong, "it does not come back as it was")

    def table(self) -> dict[str, Any]:
        """What a decoder has to know, as JSON."""
        rungs = {str(resolution): found for resolution, found in self.pushed.rungs.items()}
        counts = [len(block.members) for block in self.pushed.blocks]
        return {**self.settings.table(), "blocks": counts, "rungs": rungs}

    def _gather(self, block: Block) -> Tensor:
        return blocks.gather(self.images, block, self.model.config.channels)

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

    def _works_alone(self, i: int) -> bool:
        # On a stack that is deep enough for full accuracy.
        alone = Group((i,), self.sizes[i].padded(self.model.multiple))
        image = self._gather(Block(alone.members, alone.size))
        coder, stack = coder_of(self.model, self.settings), Stack(_deep(64 * image.numel()))
        try:
            pushed = coder.push(stack, [alone], self._gather, _nothing)
            (found,) = coder.pop(stack, pushed.blocks, pushed.rungs, _nothing)
        except CodingError:
            return False
        return torch.equal(found, image)

    @torch.no_grad()
    def bounds(self, model: MultiResolutionFlow) -> list[float]:
        """The model's bound on every block, in bits, with the noise that it was coded with.

        What padding costs is in it.
        """
        found = []
        for number, (block, tally) in enumerate(
            zip(self.pushed.blocks, self.pushed.tallies, strict=True)
        ):
            dtype = model.level(model.config.finest).dtype
            generator = seeds.generator(seeds.of_batch(0, number))
            images = self._gather(block).to(torch.uint8)
            x, log_q = dequantise(
                images, kind=model.config.pixel_noise, generator=generator, dtype=dtype
            )
            if tally.point is not None:
                x = tally.point.to(dtype)
                log_q = log_density(x * 256 - images, model.config.pixel_noise)
            parts = likelihoods(model, x, log_q, generator=generator)
            total = sum(float(part.log_prob.double().sum()) for part in parts.values())
            found.append(-total / math.log(2))
        return found

    def accurate(
        self, bounds: list[float] | None
    ) -> tuple[int, dict[int, float], float | None]:
        """Images not at full accuracy; of the others, bits/dim by level and percent over bound."""
        fine = [
            i for i, _ in enumerate(self.pushed.blocks)
            if all(rungs[i] == 0 for rungs in self.pushed.rungs.values())
        ]  # fmt: skip
        members = [i for number in fine for i in self.pushed.blocks[number].members]
        dims = sum(self.images[i].numel() for i in members)
        spent: dict[int, float] = {}
        for number in fine:
            for resolution, bits in self.pushed.tallies[number].spent.items():
                spent[resolution] = spent.get(resolution, 0.0) + bits
        excess = None
        if bounds is not None and fine:
            excess = 100 * (sum(spent.values()) / sum(bounds[i] for i in fine) - 1)
        levels = {resolution: bits / dims for resolution, bits in sorted(spent.items())}
        return len(self.images) - len(members), levels, excess


def _nothing(_: object = None) -> None:
    pass


def _deep(bits: int) -> Words:
    """Words of a stack with so many bits on it, as good as random."""
    words = (ans.keyed(bits // 32 + 4, 0) >> np.uint64(32)).astype(np.uint32)
    words[-1] |= 1
    return words


def _checked(model: MultiResolutionFlow, images: Sequence[Tensor] | Tensor) -> list[Tensor]:
    channels, found = model.config.channels, list(images)
    if model.config.nbits != 8:
        raise UserError(
            f"a model of {model.config.nbits} bits drops the others of 8-bit images: code them "
            "with a model of 8"
        )
    for i, image in enumerate(found):
        if image.dtype != torch.uint8 or image.dim() != 3 or not image.numel():
            raise UserError(
                f"image {i} must be uint8 (C, H, W), got {image.dtype} of shape "
                f"{tuple(image.shape)}"
            )
        if len(image) != channels and not (len(image) == 1 and channels == 3):
            raise UserError(
                f"image {i} has {len(image)} channel(s) but the model was built for {channels}; "
                "convert it or choose another model"
            )
    return [image.detach().cpu().contiguous() for image in found]
