"""The file format: what is read is what was written, or one line that says why not."""

import os
import random
import re
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fuzzing import examples, fuzz, spoilt
from hypothesis import given, settings
from hypothesis import strategies as st
from mending import Parts, apart, mended, spelt, together

from mrcnf.codec import header
from mrcnf.codec.container import Contents, Entry, Stream, describe, pack, read, unpack
from mrcnf.codec.contents import MAX_IMAGES, MAX_NAME
from mrcnf.errors import UserError

ONE = Contents(b"m" * 16, {}, (Entry("", 32, 32, 3),), (Stream(0, 0, 1, b"d" * 1300, 5),))
NAMES = ("flower", "été 2.tif", "c")
BITS = {8: (b"a" * 40, b"b" * 30), 16: (b"c" * 90, b"d" * 110)}
LEVELS = Contents(
    b"m" * 32,
    {"steps": 64, "levels": {"16": {"sigma": 0.003}}},
    (*(Entry(name, 16, 16, 1) for name in NAMES), Entry("d", 1, 2, 3, stored=b"PNG")),
    tuple(Stream(r, 2 * i, 2 - i, BITS[r][i], r) for r in (8, 16) for i in range(2)),
)

GOLDEN = Path(__file__).with_name("golden")


def refusal(call, *args, **options):
    with pytest.raises(UserError) as error:
        call(*args, **options)
    return str(error.value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)  # fmt: skip


@st.composite
def contents(draw):
    count = draw(st.integers(1, 12))
    sides = st.integers(1, 70)
    entries = tuple(
        Entry(
            f"{i}{draw(st.text('aé_- .', max_size=3))}x", draw(sides), draw(sides),
            draw(st.sampled_from((1, 3))), draw(st.none() | st.binary(max_size=30)),
        )
        for i in range(count)
    )  # fmt: skip
    coded = sum(entry.stored is None for entry in entries)
    streams = []
    for level in draw(st.sampled_from(((0,), (8,), (4, 8, 300)))) if coded else ():
        cuts = sorted(draw(st.sets(st.integers(1, coded - 1)))) if coded > 1 else []
        for first, end in zip([0, *cuts], [*cuts, coded], strict=True):
            bits = draw(st.binary(min_size=50, max_size=60))
            streams.append(Stream(level, first, end - first, bits, draw(st.integers(0, 2**32 - 1))))
    return Contents(
        draw(st.binary(min_size=8, max_size=32)), draw(st.dictionaries(st.text(), plain)),
        entries, tuple(streams),
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(contents())
def test_what_is_read_is_what_was_written(written):
    data = pack(written)
    assert unpack(data) == written
    assert together(apart(data)) == mended(apart(data)) == data  # as the description says


def test_files_of_version_1_are_read_for_ever():
    """Written by the first version that had the format; new versions get files of their own."""
    assert unpack((GOLDEN / "levels-1.mrc").read_bytes()) == LEVELS
    assert unpack((GOLDEN / "one-1.mrc").read_bytes()) == ONE


def test_streams_are_put_in_order():
    assert unpack(pack(replace(LEVELS, streams=LEVELS.streams[::-1]))) == LEVELS


def test_a_file_of_one_image_spends_few_bytes():
    assert len(pack(ONE)) - 1300 == 50
    own = {"growth": 0.1, "method": "euler", "sigma": 0.015, "spacing": 2.0, "steps": 96}
    levels = dict.fromkeys(("16", "32", "8"), own)
    settings = {"bits": 14, "blocks": [1], "levels": levels, "rungs": {"0": [4]}}
    named = (replace(ONE.entries[0], name="photograph"),)
    assert len(pack(replace(ONE, settings=settings, entries=named))) - 1300 < 50 + 12 + 35
    many = tuple(Entry(f"{i:04}", 32, 32, 3) for i in range(1000))
    stream = Stream(0, 0, 1000, bytes(1_300_000))
    assert len(pack(replace(ONE, entries=many, streams=(stream,)))) - 1_300_000 < 2000


@pytest.mark.parametrize("resolution", [8, 16])
def test_the_beginning_of_a_file_has_its_coarse_levels(resolution, tmp_path):
    data, streams = pack(LEVELS), tuple(s for s in LEVELS.streams if s.resolution <= resolution)
    expected = replace(LEVELS, streams=streams)
    needed = len(data) - (0 if resolution == 16 else 200)
    assert unpack(data[:needed], resolution=resolution) == expected
    assert unpack(data[:needed] + b"anything", resolution=resolution) == expected
    assert "truncated" in refusal(unpack, data[: needed - 1], resolution=resolution)
    path = tmp_path / "a.mrc"
    path.write_bytes(data)
    assert read(path, resolution=resolution) == data[:needed]
    assert read(path) == data


def test_levels_that_are_not_there_are_refused():
    assert "no level 32; choose one of [8, 16]" in refusal(unpack, pack(LEVELS), resolution=32)
    assert "share one stack" in refusal(unpack, pack(ONE), resolution=8)
    stored = replace(ONE, entries=LEVELS.entries[-1:], streams=())
    assert unpack(pack(stored), resolution=8) == stored  # the codec's to answer


@pytest.mark.parametrize("written", [ONE, LEVELS], ids=["one", "levels"])
def test_every_truncation_and_every_flipped_bit_is_noticed(written):
    data = pack(written)
    for length in range(len(data)):
        assert re.search("truncated|damaged|begins otherwise", refusal(unpack, data[:length]))
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        refusal(unpack, bytes(changed))


def test_another_version_and_another_file_are_told_apart():
    data = pack(ONE)
    parts = apart(data)
    parts.version = 2
    assert "version 2, and this mrcnf reads 1" in refusal(unpack, together(parts))
    assert "begins otherwise" in refusal(unpack, b"\x89PNG" + data[4:])
    assert "3 bytes follow its end" in refusal(unpack, data + b"...")


def entries_of(*parts):
    """The header of a file with these images and no streams."""
    return spelt(2) + b"{}" + spelt(len(parts)) + b"".join(parts) + spelt(0)


def entry(name=b"a", kind=1, height=4, width=4):
    return spelt(len(name)) + name + spelt(kind) + spelt(height) + spelt(width)


def stored(name=b"a", length=0):
    return entry(name, kind=5) + spelt(length) + bytes(4)


def json_of(text, length=None):
    return spelt(len(text) if length is None else length) + text + entries_of(stored())[3:]


def streams_of(*streams, images=1, count=None):
    names = b"".join(entry(b"%d" % i) for i in range(images))
    listed = b"".join(b"".join(map(spelt, s)) + bytes(8) for s in streams)
    number = spelt(len(streams) if count is None else count)
    return spelt(2) + b"{}" + spelt(images) + names + number + listed


HOSTILE = {
    "an image of terabytes": (entries_of(entry(height=2**21, width=2**21)), "megapixels"),
    "a side beyond any": (entries_of(entry(height=2**60)), "side of an image is more"),
    "a side of nought": (entries_of(entry(height=0)), "megapixels"),
    "a number without end": (spelt(2) + b"{}" + b"\xff" * 50, "number of images is more"),
    "a number with leading zeros": (spelt(2) + b"{}" + b"\x81\x00", "leading zeros"),
    "billions of images": (spelt(2) + b"{}" + spelt(2**31), "number of images is more"),
    "many images, one there": (spelt(2) + b"{}" + spelt(2**20) + stored(), "ends before its"),
    "no images": (entries_of(), "no images"),
    "two of a name": (entries_of(stored(b"Ab"), stored(b"aB")), "two of its images are called"),
    "a name and none": (entries_of(stored(b"a"), stored(b"")), "others have none"),
    "none and a name": (entries_of(stored(b""), stored(b"a")), "others have none"),
    "a way out": (entries_of(stored(b"../../.bashrc")), "no name for a file"),
    "a way out for Windows": (entries_of(stored(b"..\\a")), "no name for a file"),
    "the folder above": (entries_of(stored(b"..")), "no name for a file"),
    "a name that commands terminals": (entries_of(stored(b"\x1b[2J")), "no name for a file"),
    "a name of no alphabet": (entries_of(stored(b"\xff\xfe")), "not Unicode"),
    "a long name": (entries_of(stored(b"a" * (MAX_NAME + 1))), "length of its name is more"),
    "two channels": (entries_of(entry(kind=2)), "2 channels"),
    "a stored image of terabytes": (entries_of(stored(length=2**45)), "truncated"),
    "a stored image of nothing known": (entries_of(stored(length=2**63)), "is more than"),
    "nested settings": (json_of(b"[" * 900_000), "settings are not"),
    "nested objects": (json_of(b'{"a":' * 99_000 + b"1" + b"}" * 99_000), "settings are not"),
    "settings of megabytes": (json_of(b"{" + b" " * 2**21 + b"}"), "length of its settings"),
    "settings that end early": (json_of(b"{}", length=60_000), "ends before its settings"),
    "a list of settings": (json_of(b"[]"), "settings are not"),
    "a setting twice": (json_of(b'{"a":1,"a":2}'), "settings are not"),
    "a number of many digits": (json_of(b'{"a":' + b"9" * 9_000 + b"}"), "settings are not"),
    "an infinite setting": (json_of(b'{"a":1e999}'), "settings are not"),
    "no number": (json_of(b'{"a":NaN}'), "settings are not"),
    "half a surrogate": (json_of(b'{"a":"\\ud800"}'), "settings are not"),
    "bytes after the header": (entries_of(stored()) + b"?", "does not end where it should"),
    "billions of streams": (streams_of(count=2**31), "number of streams is more"),
    "a stream of terabytes": (streams_of((0, 0, 1, 2**45)), "truncated"),
    "no stream": (streams_of(), "not those of its images"),
    "streams without images": (streams_of((0, 0, 1, 0)) [:-14] + b"", "ends before"),
    "an image left out": (streams_of((0, 0, 1, 0), images=2), "not those of its images"),
    "an image too many": (streams_of((0, 0, 2, 0)), "not those of its images"),
    "an image twice": (streams_of((0, 0, 1, 0), (0, 0, 1, 0)), "disorder"),
    "a stream of none": (streams_of((0, 0, 0, 0), (0, 0, 1, 0)), "disorder"),
    "fine before coarse": (streams_of((16, 0, 1, 0), (8, 0, 1, 0)), "disorder"),
    "one stack and levels": (streams_of((0, 0, 1, 0), (8, 0, 1, 0)), "disorder"),
    "images out of nothing": (streams_of((0, 0, 1, 0)), "from streams of 0 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_files_are_one_line(hostile):
    head, words = HOSTILE[hostile]
    started = time.perf_counter()
    said = refusal(unpack, together(Parts(1, b"m" * 16, head, b"")))
    assert words in said and len(said) < 300
    assert time.perf_counter() - started < 20  # not for ever, on any machine


def test_coarse_images_out_of_nothing():
    """What is asked of a beginning must come from its bytes, not from those that are to follow."""
    large = replace(ONE, entries=(Entry("a", 4096, 4096, 3),))
    streams = (Stream(2048, 0, 1, b"?"), Stream(4096, 0, 1, bytes(2**14)))
    assert "from streams of 1 bytes" in refusal(
        unpack, pack(replace(large, streams=streams)), resolution=2048
    )


def test_a_header_that_would_inflate_without_end():
    parts = Parts(1, b"m" * 16, bytes(2**24), b"")
    data = together(parts)
    assert len(data) < 2**15
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(unpack, data)
    parts.header += b"?"
    assert "length of its header is more" in refusal(unpack, together(parts))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def test_the_mending_is_right():
    """Or the tests with mended checksums would test checksums."""
    data = pack(LEVELS)
    parts = apart(data)
    parts.rest = parts.rest[:-1] + b"?"
    assert "checksum of coded images 3 to 3 at level 16" in refusal(unpack, together(parts))
    assert unpack(mended(parts)).streams[-1].data == b"d" * 109 + b"?"
    parts = apart(data)
    parts.header = parts.header.replace(b"flower", b"flawer")
    assert unpack(together(parts)).entries[0].name == "flawer"


def test_spoilt_files_are_refused():
    assert fuzz(examples(), unpack, 3000) == 3000
    refused = fuzz(examples(), unpack, 3000, mend=True)
    assert 1000 < refused < 2900


@pytest.mark.slow
def test_many_spoilt_files_are_refused():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fuzz(examples(), unpack, 150_000, seed=2) == 150_000
    fuzz(examples(), unpack, 50_000, mend=True, seed=3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ((Entry("a", 1, 1, 1, b""), Entry("A", 1, 1, 1, b"")), "two of its images"),
        ((Entry("a/b", 1, 1, 1, b""),), "no name for a file"),
        ((Entry("\udcff", 1, 1, 1, b""),), "not Unicode"),
        ((Entry("a" * 201, 1, 1, 1, b""),), "201 bytes"),
        ((Entry("a", 2**14, 2**13, 1, b""),), "megapixels"),
        ((), "0 images, where 1 to"),
    ],
)
def test_what_would_not_be_read_is_not_written(entries, words):
    assert words in refusal(pack, replace(ONE, entries=entries, streams=()))


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"a": (1, 2)}}, {"settings": {1: 2}}, {"settings": {"a": float("nan")}},
        {"settings": {"a": b""}}, {"model": b""}, {"model": bytes(33)},
    ],
)  # fmt: skip
def test_what_would_not_come_back_is_a_mistake_of_the_caller(changes):
    with pytest.raises((ValueError, TypeError)):
        pack(replace(ONE, **changes))


def test_a_file_is_read_no_further_than_it_goes(tmp_path):
    path = tmp_path / "a.mrc"
    head = streams_of((0, 0, 1, 2**45))
    path.write_bytes(together(Parts(1, b"m" * 16, head, b"")))
    assert len(read(path)) == path.stat().st_size
    with open(path, "ab") as file:
        file.truncate(2**33)  # sparse
    path2 = tmp_path / "b.mrc"
    path2.write_bytes(pack(ONE))
    with open(path2, "ab") as file:
        file.truncate(2**33)
    assert len(read(path2)) == len(pack(ONE)) + 1
    assert "1 bytes follow its end" in refusal(unpack, read(path2))


@pytest.mark.parametrize("content", [None, b"", b"\x93mrc", b"\x93mrc\x01", os.urandom(99)])
def test_what_is_no_file_is_named(tmp_path, content):
    path = tmp_path / "a.mrc"
    if content is not None:
        path.write_bytes(content)
    for call in (read, describe):
        assert refusal(call, path).startswith(f"{path}: ")


def test_a_file_is_described(tmp_path):
    path = tmp_path / "a.mrc"
    path.write_bytes(pack(LEVELS))
    said = describe(path)
    size, values = len(pack(LEVELS)), 3 * 256 + 6
    assert f"4 images in {size} bytes, {8 * size / values:.3f} bits/dim" in said
    for words in ("format 1", "6d" * 32, '"steps":64', "level 8: 70 bytes in 2 streams",
                  "level 16: 200 bytes in 2 streams", "3 of 16×16, grey", "1 of 2×1, RGB",
                  "1 stored as PNG"):  # fmt: skip
        assert words in said
    assert "whole" not in said
    path.write_bytes(pack(LEVELS)[:-1])
    assert "not whole: it is truncated" in describe(path)
    path.write_bytes(pack(ONE))
    assert "all levels on one stack: 1,300 bytes in 1 streams" in describe(path)


def test_spoiling_changes_something():
    letters = random.Random(0)
    assert all(spoilt(b"abc", letters) != b"abc" for _ in range(300))


def test_limits_leave_room():
    """A header of as many images as are allowed, with names of eight letters, is not too long."""
    assert header.MAX_HEADER > MAX_IMAGES * (1 + 8 + 1 + 2 + 2)
