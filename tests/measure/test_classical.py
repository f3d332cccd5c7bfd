"""Classical formats: the sizes of the files that they write, which give their images back."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mrcnf.data.imagefile import read_image
from mrcnf.errors import UserError
from mrcnf.measure.classical import FORMATS, available, classical_sizes

FLAT = torch.full((5, 1, 16, 16), 77, dtype=torch.uint8)
RANDOM = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
EXTRA = [name for name, form in FORMATS.items() if form.extra]
WEBP = [{"quality": 100, "method": 6}, {"quality": 75, "method": 4}]


@pytest.mark.parametrize("pixels", [FLAT, RANDOM], ids=["flat", "random"])
@pytest.mark.parametrize(
    ("name", "efforts"),
    [("PNG", [{"optimize": True}]), ("lossless WebP", [{"lossless": True, **o} for o in WEBP])],
)
def test_sizes_are_those_of_files(tmp_path, pixels, name, efforts):
    def size(image):
        array, sizes = image.permute(1, 2, 0).numpy(), []
        picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        for options in efforts:
            path = tmp_path / f"image.{name[-4:].lower().strip()}"
            picture.save(path, **options)
            back = read_image(path, channels=image.shape[0])
            assert torch.equal(back, image)  # without loss
            sizes.append(8 * path.stat().st_size)
        return min(sizes)

    alone, mosaic = classical_sizes(pixels, [name])
    assert (alone.name, alone.mosaic, mosaic.mosaic) == (name, False, True)
    expected = sum(size(image) for image in pixels) / pixels.numel()
    assert alone.bits_per_dim == pytest.approx(expected)
    columns = 3  # the squarest arrangement of five, with one white cell
    rows = [torch.cat([*pixels[:3]], 2),
            torch.cat([*pixels[3:], torch.full_like(pixels[0], 255)], 2)]  # fmt: skip
    assert rows[0].shape[2] == columns * 16
    expected = size(torch.cat(rows, 1)) / pixels.numel()
    assert mosaic.bits_per_dim == pytest.approx(expected)
    if pixels is FLAT:
        assert mosaic.bits_per_dim < alone.bits_per_dim < 3
    else:
        assert 8 < mosaic.bits_per_dim < 13 and alone.bits_per_dim > 8


@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_gives_the_images_back(channels):
    """Which is compared inside; here, that a ramp takes fewer bits than noise, and takes time."""
    pytest.importorskip("imagecodecs", reason="the extra compare is not installed")
    ramp = torch.arange(32, dtype=torch.uint8).expand(4, channels, 32, 32).contiguous()
    noise = torch.randint(0, 256, ramp.shape, dtype=torch.uint8)
    for easy, hard in zip(classical_sizes(ramp), classical_sizes(noise), strict=True):
        assert easy.bits_per_dim < 2 and 8 < hard.bits_per_dim < 11
        assert min(easy.encoding, easy.decoding, hard.encoding, hard.decoding) > 0
        assert hard.mosaic or hard.bits_per_dim > 8
    assert len({size.name for size in classical_sizes(ramp)}) == len(FORMATS) == 5


def test_a_harder_effort_takes_less():
    imagecodecs = pytest.importorskip("imagecodecs", reason="the extra compare is not installed")
    images = torch.randint(0, 8, (1, 3, 64, 64), dtype=torch.uint8).cumsum(3).to(torch.uint8)
    array = images[0].permute(1, 2, 0).numpy()
    quick = len(imagecodecs.jpegxl_encode(array, lossless=True, effort=1))
    for effort in (7, 9):
        size, _ = classical_sizes(images, [f"JPEG XL, effort {effort}"])
        assert size.bits_per_dim < 8 * quick / images.numel()


def test_a_file_that_loses_something_is_an_error(monkeypatch):
    broken = dataclasses.replace(FORMATS["PNG"], decode=lambda data: np.zeros((16, 16), np.uint8))
    monkeypatch.setitem(FORMATS, "PNG", broken)
    with pytest.raises(RuntimeError, match="PNG does not give"):
        classical_sizes(FLAT, ["PNG"])


def test_what_is_left_out_without_the_extra_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    names, why = available()
    assert names == ["PNG", "lossless WebP"]
    assert all(name in why for name in EXTRA) and "pip install 'mrcnf[compare]'" in why
    assert [size.name for size in classical_sizes(FLAT)] == [n for n in names for _ in range(2)]
    with pytest.raises(UserError, match="jpegls needs imagecodecs: pip install"):
        classical_sizes(FLAT, ["JPEG-LS"])


def test_nothing_is_left_out_with_it():
    pytest.importorskip("imagecodecs", reason="the extra compare is not installed")
    assert available() == (list(FORMATS), "")
