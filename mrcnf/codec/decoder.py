"""From the bytes of a file to its images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mrcnf.codec import ans, blocks, container
from mrcnf.codec.ans import CodingError, Stack
from mrcnf.codec.blocks import Size
from mrcnf.codec.contents import Contents, Stream, check_of
from mrcnf.codec.identity import identity
from mrcnf.codec.portable import portable as portably
from mrcnf.codec.pyramid import coder_of
from mrcnf.codec.ramp import PLAIN
from mrcnf.codec.settings import Settings
from mrcnf.data.imagefile import decode_png
from mrcnf.errors import UserError
from mrcnf.image import haar
from mrcnf.model.model import MultiResolutionFlow


def decompress(
    model: MultiResolutionFlow,
    data: bytes,
    *,
    resolution: int | None = None,
    progress: bool = False,
) -> list[Tensor]:
    """The images of a file, uint8 (C, H, W) each, in their order.

    Args:
        model: that they were coded with.
        data: the file's bytes; of a file with an integer pyramid, what its beginning must have
            for `resolution` is enough.
        resolution: of a level: the images at its scale, as the integer pyramid has them.

    Raises:
        UserError: another model's file, none at all, a damaged one; coarse images of a file that
            has one stack for all levels.
    """
    if resolution is not None:
        model.level(resolution)
    contents = container.unpack(data, resolution=resolution)
    if contents.model != identity(model)[: len(contents.model)]:
        raise UserError("it was written with another model; name the run that it was written with")
    factor = model.config.finest // (resolution or model.config.finest)
    if any(entry.stored is None for entry in contents.entries):
        ans.require()
    coded = iter(_coded(model, contents, resolution, progress))
    found = []
    for entry in contents.entries:
        if entry.stored is None:
            found.append(next(coded))
        else:
            image = decode_png(entry.stored, (entry.channels, entry.height, entry.width))
            found.append(reduced(image, factor))
    return found


def _coded(
    model: MultiResolutionFlow,
    contents: Contents,
    resolution: int | None,
    progress: bool,
) -> list[Tensor]:
    """The images of the streams."""
    entries = [entry for entry in contents.entries if entry.stored is None]
    if not entries:
        return []
    if any(entry.channels not in (1, model.config.channels) for entry in entries):
        raise UserError("it is damaged: it has images of more channels than its model")
    kind = {0} if not model.level(model.config.finest).pyramid.own_noise else {*model.resolutions}
    if not {stream.resolution for stream in contents.streams} <= kind:
        raise UserError("it is damaged: its streams are not those of its model's levels")
    sizes = [Size(entry.height, entry.width) for entry in entries]
    channels = [entry.channels for entry in entries]
    try:
        with decoding(model, contents.settings.get("portable") is True) as own:
            found = pop_images(
                own, contents.settings, contents.streams, sizes, channels, resolution, progress
            )
    except CodingError:
        raise UserError(_DIFFERENT) from None
    if check_of(image.numpy().tobytes() for image in found) != contents.streams[-1].check:
        raise UserError(_DIFFERENT)
    return found


_DIFFERENT = (
    "it does not decode to what was coded: it is damaged, or networks give other numbers on this "
    "machine than where it was written; decode it there, or with the same versions"
)


def pop_images(
    model: MultiResolutionFlow,
    table: Mapping[str, Any],
    streams: Sequence[Stream],
    sizes: Sequence[Size],
    channels: Sequence[int],
    resolution: int | None = None,
    progress: bool = False,
) -> list[Tensor]:
    """The images that were coded into streams, coarsest level first; within `decoding`.

    Args:
        table: the file's settings.

    Raises:
        CodingError: into these none were.
        UserError: the settings are not for this model.
    """
    settings = Settings.from_table(table, model)
    plan = blocks.cut(blocks.groups(sizes, model.multiple), _integers(table.get("blocks")))
    rungs = _rungs(model, table.get("rungs"), len(plan))
    factor = model.config.finest // (resolution or model.config.finest)
    data = b"".join(stream.data for stream in reversed(streams))
    if len(data) % 4:
        raise CodingError("no whole number of words")
    stack, coder = Stack(np.frombuffer(data, "<u4").astype(np.uint32)), coder_of(model, settings)
    with tqdm(total=len(sizes), desc="decoding", disable=not progress) as bar:
        found = coder.pop(stack, plan, rungs, bar.update, resolution)
    coarse = [Size(-(-size.height // factor), -(-size.width // factor)) for size in sizes]
    images: dict[int, Tensor] = {}
    for block, batch in zip(plan, found, strict=True):
        images.update(blocks.scatter(batch, block, coarse, channels))
    return [images[i] for i in range(len(sizes))]


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
    block = blocks.Block((0,), size)
    x = blocks.gather([image], block, len(image))
    while factor > 1:
        _, x = haar.lift(x)
        factor //= 2
    return x[0].to(torch.uint8)
