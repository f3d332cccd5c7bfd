"""The header of a file `.mrc`, to bytes and back; `container` says what lies where."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from mrcnf.codec.contents import (
    MAX_IMAGES,
    MAX_LEVEL,
    MAX_NAME,
    MAX_SETTINGS,
    Contents,
    Entry,
    Stream,
    canonical,
    check_entry,
    check_size,
    check_streams,
    levels_of,
    parsed,
)
from mrcnf.codec.fields import Fields, Malformed, counted, deflate, inflate, number, word
from mrcnf.data.imagefile import MAX_PIXELS
from mrcnf.errors import UserError

MAGIC = b"\x93mrc"
VERSION = 1
"""Of the format that this version writes, and the only one that it reads."""
MAX_HEADER = 2**24
"""Bytes of a header."""
MAX_LENGTH = 2**62
"""Bytes of a stored image or stream."""
STORED = 4
"""What a stored image adds to its channels to make its kind."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes after the header: a stored image or a stream."""

    length: int
    checksum: int


@dataclass(frozen=True)
class Header:
    """All of a file but the pieces that follow its header."""

    contents: Contents
    """With no bytes in its streams and stored images."""
    pieces: list[Piece]
    """Stored images, then streams."""
    start: int
    """Bytes of the file up to the first piece."""

    @property
    def end(self) -> int:
        """Bytes of the whole file."""
        return self.start + sum(piece.length for piece in self.pieces)

    def up_to(self, resolution: int | None) -> Header:
        """The header as it would be without the levels above one; None: itself.

        Raises:
            UserError: there is no such level, or one stack for all.
        """
        streams, levels = self.contents.streams, levels_of(self.contents)
        if resolution is None or not levels:
            return self
        if levels == [0]:
            raise UserError(
                "its levels share one stack of bits, so none can be had without the others; "
                "decompress it whole, without --resolution"
            )
        if resolution not in levels:
            raise UserError(f"it has no level {resolution}; choose one of {levels}")
        kept = tuple(stream for stream in streams if stream.resolution <= resolution)
        pieces = self.pieces[: len(self.pieces) - len(streams) + len(kept)]
        with damage():
            lengths = [piece.length for piece in pieces[-len(kept) :]]
            check_size(self.contents.entries, kept, lengths, levels[-1])
        return replace(self, contents=replace(self.contents, streams=kept), pieces=pieces)

    def cut(self, data: bytes) -> Iterator[bytes]:
        """The pieces' bytes; a UserError where one is not as its checksum says."""
        at, images = self.start, len(self.pieces) - len(self.contents.streams)
        for index, piece in enumerate(self.pieces):
            content = data[at : at + piece.length]
            if zlib.crc32(content) != piece.checksum:
                what = f"stored image {index + 1}"
                if index >= images:
                    stream = self.contents.streams[index - images]
                    level = f" at level {stream.resolution}" if stream.resolution else ""
                    last = stream.first + stream.count
                    what = f"coded images {stream.first + 1} to {last}{level}"
                raise UserError(
                    f"it is damaged: the checksum of {what} does not match; get an intact copy"
                )
            yield content
            at += piece.length


@contextmanager
def damage() -> Iterator[None]:
    """Within: what no encoder writes is a UserError."""
    try:
        yield
    except Malformed as error:
        raise UserError(f"it is damaged: {error}; get an intact copy") from None


def write_header(contents: Contents) -> bytes:
    """A file up to its first piece.

    Raises:
        Malformed: see `check_entry`, `check_streams`, `check_size`; it would be too long.
        ValueError: see `canonical`.
    """
    settings = canonical(contents.settings)
    plain = b"".join(_fields(contents, settings))
    if not 0 < len(contents.entries) <= MAX_IMAGES:
        raise Malformed(f"{len(contents.entries):,} images, where 1 to {MAX_IMAGES:,} are possible")
    if len(plain) > MAX_HEADER or len(settings) > MAX_SETTINGS:
        raise Malformed("its names or settings are too long")
    known: set[str] = set()
    for entry in contents.entries:
        check_entry(entry, known)
    check_streams(contents.entries, contents.streams)
    check_size(contents.entries, contents.streams, [len(s.data) for s in contents.streams])
    packed = deflate(plain)
    lengths = number(len(packed)) + number(len(plain))
    head = MAGIC + bytes([VERSION]) + lengths + counted(contents.model) + packed
    return head + word(zlib.crc32(head))


def _fields(contents: Contents, settings: bytes) -> Iterator[bytes]:
    yield counted(settings)
    yield number(len(contents.entries))
    for entry in contents.entries:
        yield counted(entry.name.encode(errors="surrogatepass"))  # refused later, by its name
        yield number(entry.channels + STORED * (entry.stored is not None))
        yield number(entry.height) + number(entry.width)
        if entry.stored is not None:
            yield number(len(entry.stored)) + word(zlib.crc32(entry.stored))
    yield number(len(contents.streams))
    for stream in contents.streams:
        for value in (stream.resolution, stream.first, stream.count, len(stream.data)):
            yield number(value)
        yield word(zlib.crc32(stream.data)) + word(stream.check)


@dataclass(frozen=True)
class Opening:
    """What precedes the header."""

    model: bytes
    packed: int
    """Bytes of the header in the file."""
    plain: int
    """Bytes of the header itself."""
    at: int
    """Where it begins."""

    MOST = 64
    """More bytes than all of this can take."""

    @property
    def end(self) -> int:
        """Bytes of the file up to the header's checksum, and with it."""
        return self.at + self.packed + 4


def read_opening(data: bytes) -> Opening:
    """The first bytes of a file.

    Raises:
        UserError: they are those of another version, or of something else.
    """
    if not data.startswith(MAGIC):
        raise UserError("it begins otherwise than a file of `mrcnf compress`; name one that is")
    with damage():
        fields = Fields(data, len(MAGIC))
        version = fields.take("version", 1)[0]
        if version != VERSION:
            raise UserError(
                f"its format is of version {version}, and this mrcnf reads {VERSION}; use the "
                "mrcnf that wrote it"
            )
        packed, plain = (fields.number("length of its header", MAX_HEADER) for _ in range(2))
        model = fields.counted("model", 32)
        if len(model) < 8 or packed > plain:
            raise Malformed("it has no header")
        return Opening(model, packed, plain, fields.at)


def read_header(data: bytes) -> Header:
    """The header of a file, of which `data` are the beginning or all.

    Raises:
        UserError: it is of another version, truncated, altered, or says what cannot be.
    """
    opening = read_opening(data)
    if opening.end > len(data):
        raise UserError("it is truncated within its header; get a whole copy")
    body = opening.end - 4
    if word(zlib.crc32(data[:body])) != data[body : opening.end]:
        raise UserError("it is damaged: its header's checksum does not match; get an intact copy")
    with damage():
        fields = Fields(inflate(data[opening.at : body], opening.plain))
        settings = parsed(fields.counted("settings", MAX_SETTINGS))
        entries, images = _entries(fields)
        streams, bits = _streams(fields, len(data))
        if fields.at != opening.plain:
            raise Malformed("its header does not end where it should")
        check_streams(entries, streams)
        check_size(entries, streams, [piece.length for piece in bits])
    contents = Contents(opening.model, settings, entries, streams)
    return Header(contents, images + bits, opening.end)


def _entries(fields: Fields) -> tuple[tuple[Entry, ...], list[Piece]]:
    entries, pieces, known = [], [], set[str]()
    for _ in range(fields.number("number of images", MAX_IMAGES)):
        try:
            name = fields.counted("name", MAX_NAME).decode()
        except UnicodeDecodeError:
            raise Malformed("a name is not Unicode") from None
        kind = fields.number("kind of image", 3 + STORED)
        height, width = (fields.number("side of an image", MAX_PIXELS) for _ in range(2))
        entry = Entry(name, height, width, kind % STORED, b"" if kind >= STORED else None)
        check_entry(entry, known)
        entries.append(entry)
        if entry.stored is not None:
            length = fields.number("length of a stored image", MAX_LENGTH)
            pieces.append(Piece(length, fields.word("checksum of a stored image")))
    if not entries:
        raise Malformed("it holds no images")
    return tuple(entries), pieces


def _streams(fields: Fields, size: int) -> tuple[tuple[Stream, ...], list[Piece]]:
    streams, pieces = [], []
    # Their checksums, which nothing deflates, take more than a byte of the file each.
    for _ in range(fields.number("number of streams", size)):
        level = fields.number("level", MAX_LEVEL)
        first, count = (fields.number("number of images", MAX_IMAGES) for _ in range(2))
        length = fields.number("length of a stream", MAX_LENGTH)
        pieces.append(Piece(length, fields.word("checksum of a stream")))
        streams.append(Stream(level, first, count, b"", fields.word("check of a stream")))
    return tuple(streams), pieces
