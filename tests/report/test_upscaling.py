"""Upscaling files: at which scale, what is said, and what is never overwritten."""

from types import SimpleNamespace

import pytest
import torch
from tiny import files, smooth_images

from mrcnf.data.imagefile import read_image, save_image
from mrcnf.data.reduce import average
from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.image.grid import enlarge
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, ModelConfig
from mrcnf.report import plot, upscaling


class Enlarging(SimpleNamespace):
    """Stands for a model of levels 4, 8, 16 that repeats pixels."""

    resolutions = (4, 8, 16)
    unit = 1
    device = torch.device("cpu")
    config = SimpleNamespace(channels=1, finest=16)

    def multiple_at(self, level):
        return self.unit

    def upscale(self, images, level, *, temperature, generator):
        assert images.dtype == torch.uint8 and images.dim() == 4
        return enlarge(images, 16 // level)


def upscale(paths, out, **options):
    return list(upscaling.upscale_files(Enlarging(), paths, out, **options))


@pytest.fixture
def image(tmp_path):
    """Writes an image, and says where."""

    def write(height, width, name="x.png"):
        pixels = torch.randint(256, (1, height, width), dtype=torch.uint8)
        save_image(tmp_path / name, pixels)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("height", "width", "level", "side"),
    [
        (4, 4, 0, 4),  # the size of a level: that level's scale
        (8, 8, 0, 8),
        (16, 16, 0, 8),  # at or above the finest: twice as large
        (32, 32, 0, 8),
        (5, 5, 0, 8),
        (4, 8, 0, 8),
        (4, 4, 8, 8),  # as told
        (30, 45, 4, 4),
    ],
)
def test_the_scale_is_the_levels_of_the_images_size_or_two(
    tmp_path, image, height, width, level, side
):
    path = image(height, width)
    said = upscale([path], tmp_path / "out", level=level, draws=1)
    factor = 16 // side
    result = read_image(tmp_path / "out/x-draw-1.png")
    assert torch.equal(result, enlarge(read_image(path), factor))
    assert said == [
        f"{path}: 1 draws of {factor * width}×{factor * height}, from level {side}'s scale, in "
        f"{tmp_path / 'out'}; averaged back to {width}×{height} they differ from the input by at "
        "most 0.00 grey levels"
    ]


@pytest.mark.parametrize(("level", "padded"), [(8, "12×8"), (4, "12×8")])
def test_padding_is_said(tmp_path, image, monkeypatch, level, padded):
    monkeypatch.setattr(Enlarging, "unit", 4)
    path = image(6, 11)
    said = upscale([path], tmp_path / "out", level=level, draws=1)
    assert said[0] == f"{path}: padded from 11×6 to {padded}, the results cropped again"
    assert len(upscale([image(8, 12, "y.png")], tmp_path / "out", level=level, draws=1)) == 1


@pytest.mark.parametrize("scales", [1, 3])
@pytest.mark.parametrize("scale", [4, 8])
def test_the_padding_that_is_said_is_the_models(monkeypatch, scales, scale):
    levels = ModelConfig(resolutions=(4, 8, 16), channels=1)
    field = FieldConfig(width=4, depth=1, scales=scales)
    model = MultiResolutionFlow(
        [Level(levels, r, field if r > 4 else None, Solver(steps=1)) for r in levels.resolutions]
    )
    asked = []
    monkeypatch.setattr(
        "mrcnf.model.model._padded", lambda images, unit: (asked.append(unit), images)[1]
    )
    model.upscale(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), scale)
    assert asked == [model.multiple_at(scale)] == [2 ** (scales - 1)]


@pytest.mark.parametrize(("level", "factor"), [(0, 2), (8, 2), (4, 4)])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (451, 300), (13, 4)])
def test_reducing_first_shows_the_truth(
    tmp_path, image, monkeypatch, level, factor, height, width
):
    shown = []
    monkeypatch.setattr(plot, "upscaling_panel", lambda *args: shown.append(args))
    path = image(height, width)
    said = upscale([path], tmp_path, level=level, reduce=True, draws=1)
    tall, wide = height // factor, width // factor
    whole = read_image(path)[None, :, : tall * factor, : wide * factor]
    ((_, inputs, draws, truth),) = shown
    assert torch.equal(truth, whole) and draws.shape == (1, *truth.shape)
    assert torch.equal(inputs, average(whole, tall, wide))
    cropped = f"{path}: cropped from {width}×{height} to {wide * factor}×{tall * factor}"
    assert any(line.startswith(cropped) for line in said) == (truth.shape[2:] != (height, width))
    assert f"{path}: reduced from {wide * factor}×{tall * factor} to {wide}×{tall}" in said


@pytest.mark.parametrize(
    ("names", "clash"),
    [
        (("a/x.png", "b/x.png"), "a/x.png and .*b/x.png would both be written to .*x-draw-1.png"),
        (("a/x.png", "a/y.png", "a/X.jpg"), "a/x.png and .*a/X.jpg would both"),
        (("a/x.png", "a/x.png"), "a/x.png and .*a/x.png would both"),
        (("out/x.png", "out/x-draw-2.png"), "out/x.png would be written over .*out/x-draw-2.png"),
        (("out/x-PANEL.png", "b/x.png"), "b/x.png would be written over .*out/x-PANEL.png"),
    ],
)
def test_nothing_is_written_over_a_result_or_an_image(tmp_path, image, names, clash):
    for name in names:
        if name.endswith(".png"):
            image(8, 8, name)
    before = files(tmp_path)
    with pytest.raises(UserError, match=clash):
        upscale([tmp_path / name for name in names], tmp_path / "out", draws=2)
    assert files(tmp_path) == before


def test_images_may_lie_where_their_results_go(tmp_path, image):
    paths = [image(8, 8), image(8, 8, "x-draw-9.png")]
    upscale(paths, tmp_path, draws=2)
    assert (tmp_path / "x-draw-9-draw-2.png").is_file()


@pytest.mark.parametrize(("level", "words"), [(16, "below the finest, 16"), (5, "level 5 is none")])
def test_a_level_with_nothing_finer_is_refused(tmp_path, image, level, words):
    with pytest.raises(UserError, match=words):
        upscale([image(8, 8)], tmp_path / "out", level=level)
    assert not (tmp_path / "out").exists()


def test_a_model_of_one_level_cannot_upscale(tmp_path, image, monkeypatch):
    monkeypatch.setattr(Enlarging, "resolutions", (16,))
    with pytest.raises(UserError, match="nothing is finer"):
        upscale([image(8, 8)], tmp_path / "out")


def test_consistency_is_the_largest_difference_of_block_means():
    draws = smooth_images(3, side=8)
    means = draws.double().reshape(3, 1, 4, 2, 4, 2).mean((3, 5))
    inputs = means.round()
    inputs[1, 0, 2, 3] += 5
    expected = (means - inputs).abs().max()
    assert upscaling.consistency(inputs, draws) == pytest.approx(float(expected))
    assert 4.5 <= upscaling.consistency(inputs, draws) <= 5.5
