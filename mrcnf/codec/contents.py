"""What a file `.mrc` holds, and what such contents must fulfil, whoever wrote them."""

from __future__ import annotations

import json
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mrcnf.codec.fields import Malformed
from mrcnf.data.imagefile import MAX_PIXELS

MAX_IMAGES = 2**20
MAX_SETTINGS = 2**20
"""Bytes of the settings' JSON."""
MAX_NAME = 200
"""Bytes of a name in UTF-8: file systems take 255, of which endings take some."""
MAX_LEVEL = 2**16
"""Resolution of a level in pixels."""
VALUES_PER_BYTE = 4096
"""As many pixels, times channels, as one byte of a stream can stand for. Files of fewer than
0.002 bits each do not occur; one that claims to be would only take its reader's time and memory."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a file."""

    name: str
    """As in `check_name`; "" in a file whose images have no names."""
    height: int
    width: int
    channels: int
    """1 (grey) or 3 (RGB)."""
    stored: bytes | None = None
    """The image as PNG, if it lies in the file as such instead of being coded."""


@dataclass(frozen=True, slots=True)
class Stream:
    """The bits of some successive images at one level."""

    resolution: int
    """Of the level; 0: one stack holds all levels."""
    first: int
    """Of the images, counted among those that are coded."""
    count: int
    data: bytes
    check: int = 0
    """The codec's own number, below 2^32: `check_of` what decoding must give, say."""


@dataclass(frozen=True)
class Contents:
    """All that a file holds."""

    model: bytes
    """The first 8 to 32 bytes of the model's SHA-256."""
    settings: dict[str, Any]
    """How the images are coded, as plain JSON: no tuples, keys that are strings."""
    entries: tuple[Entry, ...]
    streams: tuple[Stream, ...]
    """Coarse levels first; at each level, they cover the coded images in their order."""


def levels_of(contents: Contents) -> list[int]:
    """The resolutions of a file's streams, coarsest first; [0] if one stack holds all levels."""
    return sorted({stream.resolution for stream in contents.streams})


def check_of(images: Iterable[bytes]) -> int:
    """A checksum, below 2^32, of the pixels of images, one after another."""
    total = 0
    for pixels in images:
        total = zlib.crc32(pixels, total)
    return total


def folded(name: str) -> str:
    """Equal for names that some file system takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def check_name(name: str) -> None:
    """`Malformed` for what could not be a file's name in any folder, or would lead out of it."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise Malformed(f"the name {name[:30]!r} is not Unicode") from None
    if not 0 < length <= MAX_NAME:
        raise Malformed(f"the name {name[:30]!r}… has {length} bytes, not 1 to {MAX_NAME}")
    if name in (".", "..") or any(c in "/\\" or unicodedata.category(c) == "Cc" for c in name):
        raise Malformed(f"{name[:30]!r} is no name for a file")


def check_entry(entry: Entry, known: set[str]) -> None:
    """`Malformed` unless an image is one that a file can hold beside those with `known` names.

    Args:
        known: the folded names of the images before it, to which its own is added.
    """
    name = folded(entry.name)
    if known and ("" in known) != (name == ""):
        raise Malformed("some of its images have names and others have none")
    if name:
        check_name(entry.name)
        if name in known:
            raise Malformed(f"two of its images are called {entry.name[:30]!r}")
    known.add(name)
    size = f"{entry.width}×{entry.height}"
    if not 0 < entry.height * entry.width <= MAX_PIXELS or entry.height < 0:
        raise Malformed(f"an image of {size}, where {MAX_PIXELS >> 20} megapixels are the most")
    if entry.channels not in (1, 3):
        raise Malformed(f"an image of {entry.channels} channels, where 1 or 3 are possible")


def check_streams(entries: Sequence[Entry], streams: Sequence[Stream]) -> None:
    """`Malformed` unless the streams of each level, coarse first, cover the coded images."""
    coded = sum(entry.stored is None for entry in entries)
    level, covered = -1, coded
    for stream in streams:
        if stream.resolution != level:
            if covered != coded or stream.resolution < level or level == 0:
                raise Malformed("its streams are in disorder")
            level, covered = stream.resolution, 0
        if stream.first != covered or stream.count < 1:
            raise Malformed("its streams are in disorder")
        covered += stream.count
    if covered != coded or (coded and not streams):
        raise Malformed("its streams are not those of its images")


def check_size(
    entries: Sequence[Entry], streams: Sequence[Stream], lengths: Sequence[int], finest: int = 0
) -> None:
    """`Malformed` where coded images are larger than their streams can make them.

    Args:
        lengths: of the streams, in bytes.
        finest: resolution of the file's finest level, if the streams lack it.
    """
    values = sum(e.height * e.width * e.channels for e in entries if e.stored is None)
    if finest:
        values = values * streams[-1].resolution ** 2 // finest**2
    if values > VALUES_PER_BYTE * sum(lengths):
        raise Malformed(f"images of {values:,} values from streams of {sum(lengths):,} bytes")


def canonical(settings: dict[str, Any]) -> bytes:
    """Settings as JSON in the one spelling that a file may have.

    Raises:
        ValueError: JSON would not give them back.
    """
    text = json.dumps(
        settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    if json.loads(text) != settings:
        raise ValueError("settings must be plain JSON: lists, no tuples; keys that are strings")
    return text.encode()


def parsed(text: bytes) -> dict[str, Any]:
    """The settings that `canonical` wrote; `Malformed` for anything else."""
    try:
        settings = json.loads(text)
        if not isinstance(settings, dict) or canonical(settings) != text:
            raise ValueError
    except (ValueError, RecursionError):
        raise Malformed("its settings are not what mrcnf writes") from None
    return settings
