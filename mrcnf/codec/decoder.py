"""From the bytes of a file to its images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor
from tqdm import tqdm

from mrcnf.codec import ans, container, lane, lanes
from mrcnf.codec.ans import CodingError
from mrcnf.codec.blocks import Size
from mrcnf.codec.contents import Contents, Entry, Stream, check_of
from mrcnf.codec.identity import identity
from mrcnf.codec.lane import ToDecode
from mrcnf.codec.settings import Settings
from mrcnf.data.imagefile import decode_png
from mrcnf.errors import UserError
from mrcnf.model.model import MultiResolutionFlow


def decompress(
    model: MultiResolutionFlow,
    data: bytes,
    *,
    resolution: int | None = None,
    workers: int = 1,
    progress: bool = False,
) -> list[Tensor]:
    """The images of a file, uint8 (C, H, W) each, in their order.

    Args:
        model: that they were coded with.
        data: the file's bytes; of a file with an integer pyramid, what its beginning must have
            for `resolution` is enough.
        resolution: of a level: the images at its scale, as the integer pyramid has them.
        workers: processes, see `encode`.

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
    coded = iter(_coded(model, contents, resolution, workers, progress))
    found = []
    for entry in contents.entries:
        if entry.stored is None:
            found.append(next(coded))
        else:
            image = decode_png(entry.stored, (entry.channels, entry.height, entry.width))
            found.append(lane.reduced(image, factor))
    return found


def _coded(
    model: MultiResolutionFlow,
    contents: Contents,
    resolution: int | None,
    workers: int,
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
    pixels = sum(entry.height * entry.width for entry in entries)
    try:
        jobs = _jobs(contents, entries, Settings.from_table(contents.settings, model), resolution)
        with tqdm(
            total=pixels, desc="decoding", unit="px", unit_scale=True, disable=not progress
        ) as bar:
            found = lanes.each(lane.decode, model, jobs, workers=workers, bar=bar)
    except CodingError:
        raise UserError(_DIFFERENT) from None
    for job, images in zip(jobs, found, strict=True):
        if check_of(image.numpy().tobytes() for image in images) != job.streams[-1].check:
            raise UserError(_DIFFERENT)
    return [image for images in found for image in images]


def _jobs(
    contents: Contents, entries: Sequence[Entry], settings: Settings, resolution: int | None
) -> list[ToDecode]:
    """What there is to decode, lane by lane.

    Raises:
        CodingError: the streams are not those of lanes.
    """
    def place(stream: Stream) -> tuple[int, int]:
        return stream.first, stream.count

    table = contents.settings
    streams = [list(own) for _, own in groupby(sorted(contents.streams, key=place), place)]
    tables = table.get("lanes") if len(streams) > 1 else [table]
    if not isinstance(tables, list) or len(tables) != len(streams):
        raise CodingError("no table for each lane")
    levels, jobs = {stream.resolution for stream in contents.streams}, list[ToDecode]()
    for own, of_lane in zip(streams, tables, strict=True):
        if not isinstance(of_lane, dict) or {stream.resolution for stream in own} != levels:
            raise CodingError("streams that are not those of lanes")
        first, count = place(own[0])
        sizes = [Size(entry.height, entry.width) for entry in entries[first : first + count]]
        channels = [entry.channels for entry in entries[first : first + count]]
        jobs.append(ToDecode(own, of_lane, settings, sizes, channels, resolution))
    return jobs


_DIFFERENT = (
    "it does not decode to what was coded: it is damaged, or networks give other numbers on this "
    "machine than where it was written; decode it there, or with the same versions"
)
