"""Photographs in parts, and files in several lanes."""

import os
import resource
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import model, smooth
from test_codec import RESIDUAL, STEPS, same
from tqdm import tqdm

from mrcnf import codec
from mrcnf.codec import blocks, container, lane, lanes, parts
from mrcnf.codec.ans import CodingError
from mrcnf.codec.blocks import Size
from mrcnf.codec.parts import Part, Rule
from mrcnf.errors import UserError

SIDES = st.integers(1, 300)


@given(st.lists(st.builds(Size, SIDES, SIDES), max_size=4), st.sampled_from([32, 64]))
def test_parts_cover_every_pixel_once_and_grow_with_what_is_coded_before(sizes, unit):
    rule, before = Rule(unit), 0
    covered = [torch.zeros(1, size.height, size.width, dtype=torch.int64) for size in sizes]
    for part in parts.cut(sizes, rule):
        assert part.top % unit == 0 == part.left % unit
        pixels = part.size.height * part.size.width
        if max(part.size.height, part.size.width) >= 2 * unit and pixels >= 2 * unit**2:
            assert rule.ratio * pixels <= before and pixels <= rule.most
        part.of(covered[part.image]).add_(1)
        before += pixels
    assert all((found == 1).all() for found in covered)


def test_parts_are_not_so_many_that_a_short_file_could_ask_for_hours():
    """However thin the image, and whatever the rule that a file gives."""
    thin = Size(1, 1 << 22)
    assert len(parts.cut([thin], Rule(32, 1 << 39, 1))) < (1 << 22) / 500


def test_small_images_are_whole():
    sizes = [Size(63, 20), Size(32, 32), Size(1, 1)]
    assert [part.size for part in parts.cut(sizes, Rule(32))] == sizes


def test_without_a_rule_all_images_are_whole():
    assert parts.cut([Size(500, 300)], None) == [Part(0, 0, 0, Size(500, 300))]


@pytest.mark.parametrize(
    "table", ["32", [32, 8], [16, 8, 9], [33, 8, 9], [32, 0, 9], [32.0, 8, 9], [32, True, 9]]
)
def test_rules_that_no_encoder_writes(table):
    with pytest.raises(CodingError):
        Rule.from_table({parts.KEY: table}, 2)


def photographs():
    return [smooth(1, 96, seed=1)[0, :, :70], *smooth(1, 64), *smooth(2, 16)]


@pytest.mark.parametrize("pyramid", ["exact", "integer"])
def test_photographs_come_back(pyramid):
    made = model(field=RESIDUAL, pyramid=pyramid)
    coded = codec.encode(made, photographs(), steps=STEPS, verify=False, bound=False)
    assert parts.KEY in container.unpack(coded.data).settings and coded.padding_percent == 0
    assert same(codec.decompress(made, coded.data), photographs())


def test_files_of_small_images_say_nothing_of_parts():
    data = codec.compress(model(), smooth(3, 4), steps=STEPS)
    assert parts.KEY not in container.unpack(data).settings


def test_a_coarse_photograph_comes_from_the_beginning_of_its_file():
    made = model(field=RESIDUAL, pyramid="integer")
    data = codec.compress(made, photographs(), steps=STEPS)
    (*_, finest) = container.unpack(data).streams
    found = codec.decompress(made, data[: -len(finest.data)], resolution=2)
    assert same(found, [lane.reduced(image, 2) for image in photographs()])


@pytest.mark.slow
def test_the_bound_on_a_photograph_is_that_of_the_whole(monkeypatch):
    made, image = model(field=RESIDUAL, size=0.3), smooth(1, 64)
    coded = codec.encode(made, image, steps=STEPS, verify=False)
    monkeypatch.setattr(lane, "WHOLE", 0)
    cut = codec.encode(made, image, steps=STEPS, verify=False)
    assert coded.data == cut.data and coded.bound != cut.bound
    assert coded.bound == pytest.approx(cut.bound, abs=0.1)


def test_padding_is_counted():
    coded = codec.encode(model(), smooth(1, 5), steps=STEPS, verify=False, bound=False)
    assert coded.padding_percent == pytest.approx(100 * (36 - 25) / 36)


def test_padding_stays_with_its_part():
    made, image = model(field=RESIDUAL), smooth(1, 71)
    assert same(codec.decompress(made, codec.compress(made, image, steps=STEPS)), list(image))


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50), st.integers(1, 60))
def test_lanes_take_all_images_in_their_order(pixels, count):
    found = lanes.split(pixels, count)
    assert [i for own in found for i in own] == list(range(len(pixels)))
    assert all(found) and len(found) <= min(count, len(pixels))


def test_small_images_after_a_large_one_share_a_lane():
    assert [len(own) for own in lanes.split([5_000_000] + 12 * [1024])] == [13]
    assert [len(own) for own in lanes.split([5_000_000] + 300 * [1024])] == [1, 300]


def test_lanes_are_of_half_a_megapixel():
    assert len(lanes.split([1024] * 512)) == 1
    assert [len(own) for own in lanes.split([1024] * 1536)] == [512] * 3


@pytest.mark.parametrize("pyramid", ["exact", "integer"])
def test_a_file_of_several_streams(pyramid):
    made, images = model(field=RESIDUAL, pyramid=pyramid), list(smooth(6, 8))
    coded = codec.encode(made, images, steps=STEPS, streams=3, verify=False)
    assert coded.streams == 3 and coded.bound > 0
    assert same(codec.decompress(made, coded.data), images)
    if pyramid == "integer":
        coarse = codec.decompress(made, coded.data, resolution=2)
        assert same(coarse, [lane.reduced(image, 2) for image in images])


def test_every_lane_is_cut_by_itself():
    """Of all images together the photograph would be late enough to be whole."""
    made = model(field=RESIDUAL)
    images = [*smooth(36, 32), *smooth(1, 64), *smooth(1, 64, seed=1)]
    coded = codec.encode(made, images[-6:], steps=1, streams=2, verify=False, bound=False)
    assert parts.KEY in container.unpack(coded.data).settings
    assert same(codec.decompress(made, coded.data), images[-6:])


def test_images_that_are_stored_lie_between_streams(monkeypatch):
    made, images, real = model(), list(smooth(5, 4)), lane.pop_images

    def pop_images(model, job, tick):
        found = real(model, job, tick)
        return [image + 1 if int(image.sum()) == worst else image for image in found]

    worst = int(images[1].sum())
    monkeypatch.setattr(lane, "pop_images", pop_images)
    coded = codec.encode(made, images, steps=STEPS, streams=5, bound=False)
    monkeypatch.undo()
    assert coded.stored and container.unpack(coded.data).entries[1].stored
    assert same(codec.decompress(made, coded.data), images)


@pytest.mark.slow
def test_the_file_is_the_same_whoever_writes_it():
    """One, two and four processes."""
    made, images = model(field=RESIDUAL), list(smooth(8, 8))
    files = [
        codec.encode(made, images, steps=STEPS, streams=4, bound=False, workers=workers).data
        for workers in (1, 2, 4)
    ]
    assert files[0] == files[1] == files[2]
    for workers in (1, 2, 4):
        assert same(codec.decompress(made, files[0], workers=workers), images)


@pytest.mark.slow
def test_processes_keep_no_file_open_for_each_image():
    """Under the usual limit of open files, and less."""
    made, images = model(resolutions=(2,)), list(smooth(300, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        coded = codec.encode(made, images, steps=1, streams=2, workers=2, bound=False)
        assert same(codec.decompress(made, coded.data, workers=2), images)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not images[0].is_shared()


def _stopped(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_is_stopped_is_one_line():
    with pytest.raises(UserError, match="fewer workers"), tqdm(disable=True) as bar:
        lanes.each(_stopped, model(), [1, 2], workers=2, bar=bar)


@pytest.mark.slow
def test_mistakes_in_other_processes_are_told():
    made, images = model(), list(smooth(4, 4))
    coded = codec.encode(made, images, steps=STEPS, streams=2, bound=False)
    contents = container.unpack(coded.data)
    table = {**contents.settings, "lanes": contents.settings["lanes"][::-1]}
    table["lanes"][0]["blocks"] = [1, 1, 1]
    spoilt = container.pack(container.Contents(
        contents.model, table, contents.entries, contents.streams
    ))  # fmt: skip
    with pytest.raises(UserError, match="does not decode"):
        codec.decompress(made, spoilt, workers=2)


def test_streams_and_workers_are_counted_from_one():
    for wrong in ({"streams": 0}, {"workers": 0}):
        with pytest.raises(UserError, match="from 1"):
            codec.encode(model(), smooth(1, 4), **wrong)
    data = codec.compress(model(), smooth(1, 4), steps=1)
    with pytest.raises(UserError, match="from 1"):
        codec.decompress(model(), data, workers=-3)


def test_block_counts_padding():
    assert blocks.Block((0, 1), Size(4, 6)).pixels == 48
