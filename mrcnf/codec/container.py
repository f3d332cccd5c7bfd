"""The file `.mrc`: which images, by which model and settings, and their coded streams.

    magic      4 bytes
    version    1 byte
    number     bytes of the header in the file
    number     bytes of the header itself; where both are equal, it is not deflated
    counted    the model: the first 8 to 32 bytes of its SHA-256
    header     deflated, as if after `fields.WORDS`
    checksum   of all that precedes it
    images     those that are stored as PNG instead of being coded
    streams    coarse levels first: a file that ends early still has those

The header: the settings as counted JSON; the number of images, and for each its counted name, its
kind (channels, and 4 more if stored), height, width and, if stored, length and checksum of the
PNG; the number of streams, and for each its level, first image, number of images, length, checksum
and check. A *number* has seven bits a byte (`fields.number`); what is *counted* comes after the
number of its bytes; checksums are CRC-32 and, like the check, four bytes, low one first.

Nothing in a file is believed: lengths are compared with the file's own, and what images would
unpack to with the bytes that they come from.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mrcnf.codec.contents import Contents, Entry, Stream, canonical, check_of, levels_of
from mrcnf.codec.fields import Malformed
from mrcnf.codec.header import VERSION, Opening, read_header, read_opening, write_header
from mrcnf.data.imagefile import reading
from mrcnf.errors import UserError

__all__ = ["Contents", "Entry", "Stream", "check_of", "describe", "named", "pack", "read", "unpack"]


def pack(contents: Contents) -> bytes:
    """The bytes of a file; its streams are put in the order of their levels.

    Raises:
        UserError: names that no file could have or that clash; more or larger images than the
            format takes.
        ValueError: settings that JSON would not give back, a model's hash of another length.
    """
    if not 8 <= len(contents.model) <= 32:
        raise ValueError(f"8 to 32 bytes of the model's hash, not {len(contents.model)}")
    ordered = sorted(contents.streams, key=lambda stream: (stream.resolution, stream.first))
    contents = replace(contents, streams=tuple(ordered))
    try:
        head = write_header(contents)
    except Malformed as error:
        raise UserError(f"this cannot be written as one .mrc file: {error}") from None
    stored = [entry.stored for entry in contents.entries if entry.stored is not None]
    return b"".join((head, *stored, *(stream.data for stream in ordered)))


def unpack(data: bytes, *, resolution: int | None = None) -> Contents:
    """What a file holds.

    Args:
        data: the file, or as much of its beginning as `resolution` needs.
        resolution: of a level; streams above it are neither needed, nor checked, nor returned.

    Raises:
        UserError: the file is truncated, altered, of another version, or none at all; it has no
            such level, or one stack for all.
    """
    whole = read_header(data)
    header = whole.up_to(resolution)
    if header.end > len(data):
        raise UserError(
            f"it is truncated: of {header.end:,} bytes, {header.end - len(data):,} are missing; "
            "get a whole copy"
        )
    if header is whole and header.end < len(data):
        raise UserError(
            f"it is damaged: {len(data) - header.end:,} bytes follow its end; get an intact copy"
        )
    pieces, contents = header.cut(data), header.contents
    entries = tuple(
        entry if entry.stored is None else replace(entry, stored=next(pieces))
        for entry in contents.entries
    )
    streams = tuple(replace(stream, data=next(pieces)) for stream in contents.streams)
    return replace(contents, entries=entries, streams=streams)


def read(path: Path, *, resolution: int | None = None) -> bytes:
    """As many bytes of a file as `unpack` needs, and no more.

    Raises:
        UserError: there is no such file, or its header is not one.
    """
    with named(path), reading(path, "a file of mrcnf compress"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(Opening.MOST)
        data += file.read(max(0, read_opening(data).end - len(data)))
        whole = read_header(data)
        header = whole.up_to(resolution)
        more = header.end - len(data) + (header is whole)  # one more shows that there is more
        # A length beyond the file's own must not become an allocation.
        return data + file.read(max(0, min(more, size)))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Within: mistakes are said with the path of the file that they are in."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from None


def describe(path: Path) -> str:
    """A file in a few lines: images, bits, model, settings, levels, and whether it is whole.

    Raises:
        UserError: there is no such file, or its header is not one.
    """
    data = read(path)
    header = read_header(data)
    contents = header.contents
    entries, levels = contents.entries, levels_of(contents)
    values = sum(entry.height * entry.width * entry.channels for entry in entries)
    lines = [
        f"{path}: {len(entries):,} images in {header.end:,} bytes, "
        f"{8 * header.end / values:.3f} bits/dim",
        f"format {VERSION}, model {contents.model.hex()} (SHA-256), "
        f"settings {canonical(contents.settings).decode()}",
    ]
    bits = header.pieces[len(header.pieces) - len(contents.streams) :]
    for level in levels:
        pairs = zip(contents.streams, bits, strict=True)
        own = [piece.length for stream, piece in pairs if stream.resolution == level]
        what = f"level {level}" if level else "all levels on one stack"
        lines.append(f"{what}: {sum(own):,} bytes in {len(own):,} streams")
    for (width, height, channels), count in Counter(
        (entry.width, entry.height, entry.channels) for entry in entries
    ).items():
        lines.append(f"{count:,} of {width}×{height}, {'grey' if channels == 1 else 'RGB'}")
    if stored := sum(entry.stored is not None for entry in entries):
        lines.append(f"{stored:,} stored as PNG")
    try:
        unpack(data)
    except UserError as error:
        lines.append(f"not whole: {error}")
    return "\n".join(lines)
