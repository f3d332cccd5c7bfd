"""The fields of a header: whole numbers in few bytes, bytes and text, read without trust."""

from __future__ import annotations

import zlib

WORDS = (
    b'0123456789.png,1,1,2,2,2,3,3,3,4,4,4,"4":[1,"2":[1,"64":{"bits":14,"blocks":[1],"levels":{'
    b'"16":{"growth":0.1,"method":"euler","sigma":0.02,"spacing":2.0,"steps":64},'
    b'"32":{"growth":0.1,"method":"euler","sigma":0.01,"spacing":2.0,"steps":64},'
    b'"8":{"growth":0.1,"method":"euler","sigma":0.04,"spacing":2.0,"steps":64}},'
    b'"rungs":{"0":[0]}}'
)
"""What headers say again and again, as if it preceded each of them. Part of the format: another
text makes another version."""


class Malformed(ValueError):
    """Bytes that are no header, or one that no encoder writes; the message says what is wrong."""


def number(value: int) -> bytes:
    """A whole number ≥ 0 in base 128, low digits first, the top bit saying that more follow.

    >>> number(5), number(300)
    (b'\\x05', b'\\xac\\x02')
    """
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def counted(data: bytes) -> bytes:
    """Bytes after their number."""
    return number(len(data)) + data


class Fields:
    """Reads fields one after another; whatever is not there, or too large, is `Malformed`."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def number(self, what: str, most: int) -> int:
        """What `number` wrote, from 0 to `most`, in the one spelling that it has."""
        value = shift = 0
        while True:
            digit = self.take(what, 1)[0]
            value |= (digit & 127) << shift
            if value > most or shift > 63:
                raise Malformed(f"{what} is more than {most:,}")
            if digit < 128:
                break
            shift += 7
        if shift and not digit:
            raise Malformed(f"{what} has leading zeros")
        return value

    def take(self, what: str, length: int) -> bytes:
        """The next so many bytes."""
        if length > len(self.data) - self.at:
            raise Malformed(f"it ends before its {what}")
        self.at += length
        return self.data[self.at - length : self.at]

    def word(self, what: str) -> int:
        """Four bytes, low first."""
        return int.from_bytes(self.take(what, 4), "little")

    def counted(self, what: str, most: int) -> bytes:
        """What `counted` wrote, of at most so many bytes."""
        return self.take(what, self.number(f"length of its {what}", most))


def word(value: int) -> bytes:
    """A number below 2^32 in four bytes, low first."""
    return value.to_bytes(4, "little")


def deflate(plain: bytes) -> bytes:
    """In fewer bytes if there is a way, otherwise as it is."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=WORDS)
    packed = packer.compress(plain) + packer.flush()
    return packed if len(packed) < len(plain) else plain


def inflate(packed: bytes, length: int) -> bytes:
    """What `deflate` was given, which had so many bytes; memory is bounded by that number."""
    if len(packed) == length:
        return packed
    unpacker = zlib.decompressobj(-15, zdict=WORDS)
    try:
        plain = unpacker.decompress(packed, length + 1)
    except zlib.error:
        raise Malformed("its header cannot be inflated") from None
    if len(plain) != length or not unpacker.eof or unpacker.unused_data:
        raise Malformed("its header is not as long as it says")
    return plain
