"""Averages of 8-bit images: exact means, rounded half up once, whoever asks for them."""

import itertools
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from writers import idx, python2_batch, random_images

from mrcnf import data
from mrcnf.data.reduce import average
from mrcnf.errors import UserError

# A value, or one of few: halves are then common.
BYTES = st.integers(0, 255) | st.sampled_from([0, 1, 2, 254, 255])


def by_fractions(plane, height, width):
    """Means of an (H, W) plane, every box by its definition and in rational numbers."""
    small = np.empty((height, width), np.uint8)
    for i, j in itertools.product(range(height), range(width)):
        rows, columns = inside(i, len(plane), height), inside(j, len(plane[0]), width)
        box = [int(plane[y][x]) for y in rows for x in columns]
        small[i, j] = floor(Fraction(sum(box), len(box)) + Fraction(1, 2))
    return small


def inside(box, pixels, boxes):
    size = Fraction(pixels, boxes)
    return [p for p in range(pixels) if box * size < p + Fraction(1, 2) <= (box + 1) * size]


@settings(deadline=None)
@given(choices=st.data())
def test_means_are_exact_and_rounded_half_up_once(choices):
    tall, wide = (choices.draw(st.integers(1, 9)) for _ in range(2))
    height, width = choices.draw(st.integers(1, tall)), choices.draw(st.integers(1, wide))
    values = choices.draw(st.lists(BYTES, min_size=2 * tall * wide, max_size=2 * tall * wide))
    images = np.array(values, np.uint8).reshape(1, 2, tall, wide)
    expected = np.stack([by_fractions(plane, height, width) for plane in images[0]])[None]
    assert np.array_equal(average(images, height, width), expected)
    got = average(torch.from_numpy(images), height, width)
    assert got.dtype == torch.uint8 and np.array_equal(got.numpy(), expected)
    # Order in memory and further dimensions change nothing.
    turned = images.transpose(3, 2, 1, 0).copy().transpose(3, 2, 1, 0)
    assert np.array_equal(average(turned, height, width), expected)
    assert np.array_equal(average(images[0, 0], height, width), expected[0, 0])


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 16, 17, 256, 257, 4100, 4101])
def test_large_boxes_do_not_overflow(factor):
    # 16² and 4100² are the last boxes whose sums, and the half added, fit 16 and 32 bits.
    white = np.full((1, 1, factor, factor), 255, np.uint8)
    assert average(white, 1, 1).item() == 255
    if factor > 2:
        assert (average(white, 2, factor - 1) == 255).all()


def test_photographs_are_divided_as_pillow_divides_them():
    image = random_images(1, 3, 75, 61)
    got = average(image, 32, 17)
    box = Image.Resampling.BOX  # of floats: it would round bytes after each of its two passes
    planes = [Image.fromarray(p).resize((17, 32), box) for p in image[0].astype(np.float32)]
    assert np.abs(got[0] - np.stack([np.array(p) for p in planes])).max() <= 0.5 + 1e-4


def test_sizes_and_types_that_cannot_be_averaged():
    images = torch.zeros(2, 3, 8, 12, dtype=torch.uint8)
    for height, width in ((9, 4), (4, 13), (0, 4), (4, -1)):
        with pytest.raises(UserError, match=rf"of 12×8 cannot.*to {width}×{height}; choose a size"):
            average(images, height, width)
    with pytest.raises(UserError, match=r"takes uint8 .* not float32 \(2, 3, 8, 12\); convert"):
        average(images.float(), 4, 4)
    with pytest.raises(UserError, match=r"not uint8 \(12,\)"):
        average(images[0, 0, 0], 1, 1)
    assert average(images[:0], 4, 4).shape == (0, 3, 4, 4)


def test_every_source_gives_the_same_pixels(tmp_path):
    # Halving twice, rounding each time, made one pixel in four brighter; rounding halves to even,
    # as tensors do, one in thirty-two darker.
    images = random_images(20, 3, 32, 32)
    expected = np.stack([[by_fractions(plane, 8, 8) for plane in image] for image in images])
    means = images.reshape(20, 3, 8, 4, 8, 4).mean((3, 5))
    halved = images
    for _ in range(2):
        quads = halved.reshape(20, 3, len(halved[0, 0]) // 2, 2, len(halved[0, 0]) // 2, 2)
        halved = np.floor(quads.mean((3, 5)) + 0.5)
    assert 0.2 < (halved != expected).mean() < 0.3
    assert 0.02 < (np.round(means) != expected).mean() < 0.05

    (tmp_path / "test_batch").write_bytes(python2_batch(images))
    (tmp_path / "files" / "train").mkdir(parents=True)
    for i, image in enumerate(images):
        picture = Image.fromarray(image.transpose(1, 2, 0))
        picture.save(tmp_path / "files" / "train" / f"{i:02}.png")
    np.savez(tmp_path / "train.npz", images=images.transpose(0, 2, 3, 1))
    for name, split in (
        ("cifar10", "test"), (f"npz:{tmp_path}", "train"), (f"folder:{tmp_path}/files", "train")
    ):
        got = data.load(name, split, root=tmp_path, resolution=8).pixels
        assert np.array_equal(got.numpy(), expected), name


def test_halving_averages_and_rounds_halves_up(tmp_path):
    pixels = random_images(5, 16, 16, 3)
    np.savez(tmp_path / "train.npz", images=pixels)
    exact = pixels.astype(float).reshape(5, 8, 2, 8, 2, 3).mean(axis=(2, 4))
    half = data.load(f"npz:{tmp_path}", resolution=8).pixels.numpy().transpose(0, 2, 3, 1)
    assert np.array_equal(half, np.floor(exact + 0.5))
    quarter = pixels.astype(float).reshape(5, 4, 4, 4, 4, 3).mean(axis=(2, 4))
    got = data.load(f"npz:{tmp_path}", resolution=4).pixels.numpy().transpose(0, 2, 3, 1)
    assert np.array_equal(got, np.floor(quarter + 0.5))
    for resolution in (5, 32, 12):
        with pytest.raises(UserError, match=f"16×16 do not come to {resolution}×{resolution}"):
            data.load(f"npz:{tmp_path}", resolution=resolution)


def test_only_squares_are_halved(tmp_path):
    np.savez(tmp_path / "train.npz", images=random_images(2, 16, 8, 3))
    assert data.load(f"npz:{tmp_path}").pixels.shape == (2, 3, 16, 8)
    for resolution in (4, 8):
        with pytest.raises(UserError, match=f"8×16 do not come to {resolution}×{resolution}"):
            data.load(f"npz:{tmp_path}", resolution=resolution)


def test_28_pixels_are_padded_before_they_are_averaged(tmp_path):
    images = random_images(4, 28, 28)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images))
    wide = np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]
    for resolution, source in ((16, wide), (8, wide), (1, wide), (14, images[:, None])):
        got = data.load("fashion-mnist", "test", root=tmp_path, resolution=resolution).pixels
        assert np.array_equal(got.numpy(), average(source, resolution, resolution))
