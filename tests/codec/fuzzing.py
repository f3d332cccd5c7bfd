"""Files spoilt at random: `python tests/codec/fuzzing.py [COUNT]` spoils as many as one likes.

Spoilt files must be refused in one line or, where what was altered does not matter, be read as what
they were. With their checksums mended, their settings and names are the spoiler's to choose; what a
codec then decodes must still be the images that went in, or refused.
"""

from __future__ import annotations

import random
import sys
import time

from mending import Parts, apart, mended

from mrcnf.codec.container import Contents, Entry, Stream, pack, unpack
from mrcnf.errors import UserError

LONGEST = 20.0
"""Seconds that a file of a few hundred bytes may take."""


def examples():
    """Files of every kind: one image and many, with and without names, levels, stored images."""
    letters = random.Random(0)
    bits = [letters.randbytes(n) for n in (70, 90, 200, 260)]
    settings = {"steps": 64, "sigma": 0.003, "levels": {"8": [1, 2]}, "ü": None}
    grey = Entry("grey", 16, 16, 1)
    stored = Entry("stored", 4, 5, 3, stored=letters.randbytes(77))
    colour = Entry("colour.png", 8, 32, 3)
    levels = [Stream(r, i, 1, bits[i + r // 16], check=r) for r in (8, 16) for i in range(2)]
    return [
        pack(contents)
        for contents in (
            Contents(b"m" * 16, {}, (Entry("", 32, 32, 3),), (Stream(0, 0, 1, bits[3]),)),
            Contents(b"m" * 32, settings, (grey, stored, colour), tuple(levels)),
            Contents(b"m" * 8, {}, (stored,), ()),
            Contents(
                b"m" * 16, settings, tuple(Entry(f"{i}", 4, 4, 1) for i in range(40)),
                tuple(Stream(0, 20 * i, 20, bits[i]) for i in range(2)),
            ),
        )
    ]  # fmt: skip


def spoilt(data, letters):
    """A few random changes of some bytes: never the bytes themselves."""
    original, data = data, bytearray(data)
    while data == original:
        for _ in range(letters.choice((1, 1, 1, 2, 5))):
            at = letters.randrange(len(data) + 1)
            many = letters.choice((1, 1, 2, 4, 9, 60))
            change = letters.randrange(7)
            if change == 0:
                del data[at:]
            elif change == 1 and at < len(data):
                data[at] ^= 1 << letters.randrange(8)
            elif change == 2:
                data[at : at + many] = letters.randbytes(many)
            elif change == 3:
                del data[at : at + many]
            elif change == 4:
                data[at:at] = letters.randbytes(many)
            elif change == 5:  # the largest numbers that there are
                data[at : at + many] = bytes([255] * many)
            else:
                other = letters.randrange(len(data) + 1)
                data[at : at + many] = data[other : other + many]
    return bytes(data)


def spoilt_and_mended(data, letters):
    """A change of the header or of what follows it, with all checksums made to fit."""
    parts = apart(data)
    header, rest = parts.header, parts.rest
    if letters.random() < 0.6:
        header = spoilt(header, letters)
    else:
        rest = spoilt(rest, letters)
    return mended(Parts(parts.version, parts.model, header, rest))


def outcome(read, data):
    """What reading gives, or None where it is refused as it should be."""
    started = time.perf_counter()
    try:
        result = read(data)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        result = None
    assert time.perf_counter() - started < LONGEST
    return result


def fuzz(originals, read, count, *, mend=False, same=None, seed=0):
    """Spoil files `count` times; how many were refused.

    Args:
        read: from bytes to anything that can be compared.
        mend: the checksums.
        same: whether what was read is as it was, by both; equality, if not mended.
    """
    letters, refused = random.Random(seed), 0
    same = same or (lambda one, other: mend or one == other)
    right = [read(data) for data in originals]
    for i in range(count):
        k = i % len(originals)
        changed = (spoilt_and_mended if mend else spoilt)(originals[k], letters)
        try:
            result = outcome(read, changed)
            assert result is None or same(result, right[k]), "read as something else"
        except BaseException:
            print(f"file {i}, from example {k}: {changed.hex()}", file=sys.stderr)
            raise
        refused += result is None
    return refused


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    for mend in (False, True):
        refused = fuzz(examples(), unpack, count, mend=mend, seed=1)
        print(f"{count:,} files{' with mended checksums' * mend}: {refused:,} refused")
