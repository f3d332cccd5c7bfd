"""Files taken apart and put together again with checksums that hold, as the hostile can.

Written from the description of the format, not with the code that reads it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from mrcnf.codec.fields import WORDS


def number(data, at):
    """A number in base 128 at a place, and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def spelt(value):
    digits = [value & 127]
    while value := value >> 7:
        digits[-1] |= 128
        digits.append(value & 127)
    return bytes(digits)


@dataclass
class Parts:
    """A file: what precedes its header, the header inflated, the bytes that follow."""

    version: int
    model: bytes
    header: bytes
    rest: bytes


def apart(data):
    packed, at = number(data, 5)
    plain, at = number(data, at)
    length, at = number(data, at)
    model, at = data[at : at + length], at + length
    header = data[at : at + packed]
    if packed != plain:
        header = zlib.decompressobj(-15, zdict=WORDS).decompress(header)
    assert len(header) == plain
    return Parts(data[4], model, header, data[at + packed + 4 :])


def together(parts):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=WORDS)
    packed = packer.compress(parts.header) + packer.flush()
    packed = packed if len(packed) < len(parts.header) else parts.header
    model = spelt(len(parts.model)) + parts.model
    start = b"\x93mrc" + bytes([parts.version])
    head = start + spelt(len(packed)) + spelt(len(parts.header)) + model + packed
    return head + struct.pack("<I", zlib.crc32(head)) + parts.rest


def mended(parts):
    """As `together`, with the streams' checksums made to fit their bytes, as far as they go."""
    header = bytearray(parts.header)
    for place, start, end in _pieces(parts.header):
        header[place : place + 4] = struct.pack("<I", zlib.crc32(parts.rest[start:end]))
    return together(Parts(parts.version, parts.model, bytes(header), parts.rest))


def _pieces(header):
    """Of each piece: where its checksum lies in the header, where it starts and ends after it."""
    pieces, start = [], 0
    try:
        length, at = number(header, 0)
        count, at = number(header, at + length)
        for _ in range(count):
            length, at = number(header, at)
            kind, at = number(header, at + length)
            _, at = number(header, at)
            _, at = number(header, at)
            if kind >= 4:
                length, at = number(header, at)
                pieces.append((at, start, start + length))
                start, at = start + length, at + 4
        count, at = number(header, at)
        for _ in range(count):
            for _ in range(4):
                length, at = number(header, at)
            pieces.append((at, start, start + length))
            start, at = start + length, at + 8
    except IndexError:  # a header that ends early
        pass
    return [piece for piece in pieces if piece[0] + 4 <= len(header)]
