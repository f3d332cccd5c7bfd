"""The demo: its files, its report, and the classical codecs that it compares with."""

import json
import re

import pytest
import torch
from PIL import Image
from runs import smooth_images

from mrcnf import demo
from mrcnf.data.imagefile import read_image
from mrcnf.report import plot
from mrcnf.runs import checkpoint

QUICK = [
    "model.resolutions=[4,8]", "field.width=4", "field.depth=1", "train.steps=3",
    "train.warmup=1", "train.log_every=1", "level.8.train.steps=3", "solver.steps=2",
    "evaluate.limit=9", "evaluate.batch=5", "train.device=cpu",
]  # fmt: skip


def test_the_demo_writes_its_report_and_figures(tmp_path, monkeypatch):
    recipe = demo.RECIPE.read_text().replace("[level.32.train]", "[level.8.train]")
    (tmp_path / "demo.toml").write_text(recipe)
    monkeypatch.setattr(demo, "RECIPE", tmp_path / "demo.toml")
    out = tmp_path / "out"
    printed = demo.run(out, QUICK)
    assert checkpoint.load(out).resolutions == (4, 8)
    for name in ("samples.png", "upscaling.png", "training.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 100
    evaluation = json.loads((out / "evaluation.json").read_text())
    report = (out / "report.md").read_text()
    assert report in printed and str(out) in printed
    assert f"**{evaluation['bpd']:.3f} ± {evaluation['bpd_stderr']:.3f}**" in report
    assert f"{evaluation['images']} images of 8×8" in report and evaluation["images"] == 9
    for level in evaluation["levels"]:
        assert f"| {level['resolution']} | {level['bpd']:.3f} ± " in report
    for name in re.findall(r"!\[\w+\]\((.*?)\)", report):
        assert (out / name).is_file()
    assert len(re.findall(r"\| (?:PNG|lossless WebP), .* \| \d+\.\d{3} \|", report)) == 4


FLAT = torch.full((5, 1, 16, 16), 77, dtype=torch.uint8)
RANDOM = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)


@pytest.mark.parametrize("pixels", [FLAT, RANDOM], ids=["flat", "random"])
@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {"optimize": True}), ("WEBP", {"lossless": True, "quality": 100, "method": 6})],
)
def test_classical_bits_are_the_sizes_of_files(tmp_path, pixels, form, options):
    def size(image):
        array = image.permute(1, 2, 0).numpy()
        picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        path = tmp_path / f"image.{form.lower()}"
        picture.save(path, **options)
        back = read_image(path, channels=image.shape[0])
        assert torch.equal(back, image)  # without loss
        return 8 * path.stat().st_size

    alone = sum(size(image) for image in pixels) / pixels.numel()
    assert demo.classical_bits(pixels, form, mosaic=False) == pytest.approx(alone)
    columns = 3  # the squarest arrangement of five, with one white cell
    rows = [torch.cat([*pixels[:3]], 2),
            torch.cat([*pixels[3:], torch.full_like(pixels[0], 255)], 2)]  # fmt: skip
    assert rows[0].shape[2] == columns * 16
    mosaic = size(torch.cat(rows, 1)) / pixels.numel()
    assert demo.classical_bits(pixels, form, mosaic=True) == pytest.approx(mosaic)
    if pixels is FLAT:
        assert mosaic < alone < 3
    else:
        assert 8 < mosaic < 13 and alone > 8


def test_consistency_is_the_largest_difference_of_block_means():
    draws = smooth_images(3, side=8)
    means = draws.double().reshape(3, 1, 4, 2, 4, 2).mean((3, 5))
    inputs = means.round()
    inputs[1, 0, 2, 3] += 5
    expected = (means - inputs).abs().max()
    assert demo.consistency(inputs, draws) == pytest.approx(float(expected))
    assert 4.5 <= demo.consistency(inputs, draws) <= 5.5


def test_grids_tile_row_by_row():
    pixels = smooth_images(5, side=4)
    picture = plot.grid(pixels, gap=2, zoom=3)
    assert picture.shape == (1, 2 * 14 + 2, 3 * 14 + 2)
    for k, image in enumerate(pixels):
        top, left = 2 + 14 * (k // 3), 2 + 14 * (k % 3)
        cell = picture[:, top : top + 12, left : left + 12]
        assert torch.equal(cell[:, ::3, ::3], image) and torch.equal(cell[:, 2::3, 1::3], image)
    assert (picture[:, :2] == 255).all() and (picture[:, 16:, 30:] == 255).all()


def test_the_running_mean_has_no_start_bias():
    assert plot.smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0] * 3)
    assert plot.smooth([0.0, 1.0], decay=0.5) == pytest.approx([0.0, 1 / 1.5])
