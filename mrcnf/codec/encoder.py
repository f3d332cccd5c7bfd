"""From images to the bytes of a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mrcnf.codec import ans, container, lane, lanes, parts
from mrcnf.codec.blocks import Size
from mrcnf.codec.contents import Contents, Entry
from mrcnf.codec.identity import identity
from mrcnf.codec.lane import Lane
from mrcnf.codec.pyramid import total
from mrcnf.codec.settings import Settings, default, with_steps
from mrcnf.errors import UserError
from mrcnf.flows.base import Flow
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
    """The model's, bits per dimension, with the noise that the images were coded with; of whole
    images, unless they are larger than `lane.WHOLE` and cut."""
    overhead_percent: float | None
    """Of the file over the bound: steps, header, and what it takes to begin."""
    seconds: float
    """For all of this, with the decoding that shows that the file is right."""
    bound_seconds: float
    """Of these, for the bound (of all streams)."""
    begun: int
    """Images that were coded less accurately, in part or as a whole, as a file has no bits to
    begin with."""
    levels: dict[int, float]
    """Of all parts at full accuracy, bits per dimension by level."""
    excess_percent: float | None
    """Of these, over the bound on them."""
    padding_percent: float
    """Pixels that sides were made up with, of all that are coded: their bits are in the file."""
    streams: int

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
    streams: int | None = None,
    verify: bool = True,
    bound: bool = True,
    workers: int = 1,
    progress: bool = False,
) -> Coded:
    """Code images without loss.

    Args:
        model: of any flow; images of its number of channels, or grey ones if it has three.
        images: uint8 (C, H, W) each, of any sizes, or (N, C, H, W).
        names: one for each, of files; none by default.
        steps: of the finest level's flow: more take longer and come closer to the bound.
        settings: all about the code; by default those that suit the model.
        portable: let every machine and version decode it, which takes longer.
        streams: at most so many, of successive whole images, that can be coded at the same time;
            each has to begin. By default one for about every half megapixel.
        verify: decode the file and store as PNG what should not come back as it was.
        bound: find the model's bound on the same noise, too.
        workers: processes, of which no more than there are streams are used. They are started
            afresh: a script that asks for several must be safe to import.

    Raises:
        UserError: images or settings that the model cannot have, names that clash, a flow
            without steps.
    """
    started = time.perf_counter()
    ans.require()
    images = _checked(model, images)
    for flow in model.modules():
        if isinstance(flow, Flow) and type(flow).steps is Flow.steps:
            flow.steps()  # refuses, also where the images are so few that none would be taken
    names = [""] * len(images) if names is None else list(names)
    if len(names) != len(images):
        raise UserError(f"{len(images)} images and {len(names)} names: give each image one")
    if streams is not None and streams < 1:
        raise UserError(f"streams are numbers from 1, got {streams}")
    lanes.check(workers)
    if settings is None:
        settings = default(model)
    if steps is not None:
        settings = with_steps(settings, steps)
    settings = replace(settings, portable=portable or settings.portable)
    pixels = [image[0].numel() for image in images]
    ranges = lanes.split(pixels, streams)
    sizes = [Size(*image.shape[1:]) for image in images]
    if all(len(parts.cut(sizes[own.start : own.stop], settings.rule)) == len(own)
           for own in ranges):  # fmt: skip
        settings = replace(settings, rule=None)
    jobs = [lane.ToEncode(images[own.start : own.stop], settings, verify, bound) for own in ranges]
    passes = 2 if verify else 1
    with tqdm(
        total=passes * sum(pixels), desc="encoding", unit="px", unit_scale=True,
        disable=not progress,
    ) as bar:  # fmt: skip
        found = lanes.each(lane.encode, model, jobs, workers=workers, bar=bar)
    stored = {
        own[i]: png
        for own, made in zip(ranges, found, strict=True)
        for i, png in made.stored.items()
    }
    entries = tuple(
        Entry(name, image.shape[1], image.shape[2], len(image), stored.get(i))
        for i, (name, image) in enumerate(zip(names, images, strict=True))
    )
    data = container.pack(_contents(identity(model), settings, entries, found))
    return _numbers(data, images, stored, found, bound, started)


def _contents(
    model: bytes, settings: Settings, entries: tuple[Entry, ...], found: Sequence[Lane]
) -> Contents:
    first, streams, tables = 0, [], []
    for own in found:
        if own.streams:
            streams += [replace(stream, first=first) for stream in own.streams]
            first += own.streams[0].count
            tables.append(own.table)
    table = tables[0] if len(tables) == 1 else {"lanes": tables}
    return Contents(model, {**settings.table(), **table}, entries, tuple(streams))


def _numbers(
    data: bytes, images: Sequence[Tensor], stored: dict[int, bytes], found: Sequence[Lane],
    bound: bool, started: float,
) -> Coded:  # fmt: skip
    dims, bits = sum(image.numel() for image in images), 8 * len(data)
    pixels = sum(image[0].numel() for i, image in enumerate(images) if i not in stored)
    fine, spent = sum(own.dims for own in found), total(own.spent for own in found)
    promised = overhead = excess = None
    if bound and dims:
        # An image that the model cannot code is as large as it is.
        least = sum(own.bound or 0.0 for own in found) + 8 * sum(map(len, stored.values()))
        promised, overhead = least / dims, 100 * (bits / least - 1)
        if fine:
            excess = 100 * (sum(spent.values()) / sum(own.fine or 0.0 for own in found) - 1)
    padding = sum(own.padding for own in found)
    return Coded(
        data, len(images), len(stored), bits / max(1, dims), promised, overhead,
        time.perf_counter() - started, sum(own.bound_seconds for own in found),
        sum(own.begun for own in found),
        {resolution: some / fine for resolution, some in sorted(spent.items())},
        excess, 100 * padding / max(1, padding + pixels), sum(bool(own.streams) for own in found),
    )  # fmt: skip


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
