"""The commands that use a trained model: what each says and writes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from terminal import mrcnf_says, refused
from tiny import smooth_images, write_npz

import mrcnf
from mrcnf import runtime
from mrcnf.data.imagefile import read_image
from mrcnf.image.grid import grid
from mrcnf.model.level import Level
from mrcnf.report import plot


def test_evaluating(made, tmp_path, capsys):
    path = tmp_path / "new" / "numbers.json"
    said = mrcnf_says(
        capsys, "evaluate", made.run, "--convergence", "--json", path, "--limit", 7, "--draws", 2,
        "--batch", 3, "solver.steps=5", "--device", "cpu",
    )  # fmt: skip
    table = json.loads(path.read_text())
    assert (table["images"], table["draws"], len(table["convergence"])) == (7, 2, 3)
    assert table["solver"] == "midpoint, 5 steps spaced as s^2"
    assert f"{table['bpd']:.4f} ± {table['bpd_stderr']:.4f} bits/dim on 7 images" in said
    assert re.findall(r"level +(\d+):", said) == ["2", "4"]


def test_evaluating_one_level_of_an_unfinished_model(made, tmp_path, capsys):
    shutil.copytree(made.run / "level-4", tmp_path / "part/level-4")
    path = tmp_path / "out.json"
    mrcnf_says(capsys, "evaluate", tmp_path / "part", "--level", 4, "--json", path)
    alone = json.loads(path.read_text())
    mrcnf_says(capsys, "evaluate", made.run, "--json", path)
    (_, within) = json.loads(path.read_text())["levels"]
    assert [level["resolution"] for level in alone["levels"]] == [4]
    # The same noise, other probes.
    assert alone["bpd"] == pytest.approx(within["bpd"], abs=4 * within["bpd_stderr"])
    said = refused(capsys, "evaluate", tmp_path / "part", "--level", 2)
    assert "no level 2: its levels are [4]" in said


def test_evaluating_other_data_and_splits(made, tmp_path, capsys):
    other = write_npz(tmp_path / "other 'quoted' ü", count=20)
    said = mrcnf_says(capsys, "evaluate", made.run, "--data", other, "--split", "train")
    assert f"on 20 images of {other} train" in said


@pytest.mark.parametrize("wish", ["--compile", "evaluate.compile=true"])
def test_evaluating_compiled(made, capsys, monkeypatch, wish):
    compiled = []
    monkeypatch.setattr(runtime, "require_compiler", lambda *_: None)
    monkeypatch.setattr(Level, "compile", lambda level: compiled.append(level.resolution))
    mrcnf_says(capsys, "evaluate", made.run)
    assert compiled == []
    mrcnf_says(capsys, "evaluate", made.run, wish)
    assert compiled == [2, 4]


def test_evaluation_refuses_what_it_would_ignore(made, capsys):
    for setting in ("field.width=9", "train.steps=3", "level.2.solver.steps=7"):
        said = refused(capsys, "evaluate", made.run, setting)
        assert "cannot be changed in a trained model" in said


def test_sampling(made, tmp_path, capsys):
    path = tmp_path / "grid.png"
    for out in (path, tmp_path / "again.png"):
        mrcnf_says(capsys, "sample", made.run, "--n", 5, "--out", out, "--zoom", 3, "--seed", 4)
    generator = torch.Generator().manual_seed(4)
    expected = grid(mrcnf.load(made.run).sample(5, generator=generator), zoom=3)
    assert torch.equal(read_image(path), expected)
    assert path.read_bytes() == (tmp_path / "again.png").read_bytes()


def test_sampling_with_the_nearest_training_images(made, tmp_path, capsys):
    path = tmp_path / "near.png"
    arguments = ["--n", 3, "--out", path, "--zoom", 2, "--seed", 4]
    mrcnf_says(capsys, "sample", made.run, "--neighbours", 2, *arguments, "--data.limit=10")
    generator = torch.Generator().manual_seed(4)
    samples = mrcnf.load(made.run).sample(3, generator=generator)
    known = smooth_images(12, seed=0)[:10]
    rows = []
    for image in samples:
        order = (image.double() - known.double()).square().flatten(1).sum(1).argsort(stable=True)
        rows.append(torch.cat((image[None], known[order[:2]])))
    assert torch.equal(read_image(path), grid(torch.cat(rows), columns=3, zoom=2))
    mrcnf_says(capsys, "sample", made.run, "--neighbours", 0, *arguments)
    assert torch.equal(read_image(path), grid(samples, zoom=2))


def test_pictures_open_elsewhere(made, tmp_path, capsys):
    mrcnf_says(capsys, "sample", made.run, "--n", 2, "--out", tmp_path / "a.png", "--zoom", 1)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "L" and image.size == (14, 8)


def test_upscaling(made, tmp_path, capsys):
    said = mrcnf_says(
        capsys, "upscale", made.run, made.folder / "2.png", made.folder / "8.png",
        "--out", tmp_path, "--draws", 2,
    )  # fmt: skip
    names = {f"{side}-{what}.png" for side in (2, 8) for what in ("draw-1", "draw-2", "panel")}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert read_image(tmp_path / "2-draw-1.png").shape == (1, 4, 4)
    assert read_image(tmp_path / "8-draw-1.png").shape == (1, 16, 16)
    assert "reduced" not in said and said.count("\n") == 2
    stated = [float(text) for text in re.findall(r"at most (\d+\.\d\d) grey levels", said)]
    for side, bound in zip((2, 8), stated, strict=True):
        inputs = read_image(made.folder / f"{side}.png").double()
        for draw in (1, 2):
            result = read_image(tmp_path / f"{side}-draw-{draw}.png").double()
            difference = (torch.nn.functional.avg_pool2d(result, 2) - inputs).abs().max()
            assert float(difference) <= bound + 0.005


def test_images_of_any_shape_are_upscaled(made, tmp_path, capsys):
    names = [made.folder / "oblong.png", made.folder / "5.png"]
    mrcnf_says(capsys, "upscale", made.run, *names, "--out", tmp_path, "--draws", 1)
    assert read_image(tmp_path / "oblong-draw-1.png").shape == (1, 8, 16)
    assert read_image(tmp_path / "5-draw-1.png").shape == (1, 10, 10)
    said = mrcnf_says(
        capsys, "upscale", made.run, names[1], "--out", tmp_path, "--draws", 1, "--reduce"
    )
    assert "5.png: cropped from 5×5 to 4×4, right and bottom\n" in said
    assert "5.png: reduced from 4×4 to 2×2\n" in said
    assert read_image(tmp_path / "5-draw-1.png").shape == (1, 4, 4)


def test_upscaling_a_reduced_image_shows_the_truth(made, tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(plot, "upscaling_panel", lambda *args: shown.append(args))
    arguments = ["--out", tmp_path, "--level", 2, "--draws", 1]
    said = mrcnf_says(capsys, "upscale", made.run, made.folder / "8.png", *arguments, "--reduce")
    assert "8.png: reduced from 8×8 to 4×4" in said
    mrcnf_says(capsys, "upscale", made.run, made.folder / "2.png", *arguments)
    (_, inputs, draws, truth), (_, _, _, none) = shown
    original = read_image(made.folder / "8.png").double()[None]
    for side, got in ((8, truth), (4, inputs)):
        means = torch.nn.functional.avg_pool2d(original, 8 // side)
        assert torch.equal(got, (means + 0.5).floor().to(torch.uint8))
    assert draws.shape == (1, 1, 1, 8, 8) and none is None


def test_samples_of_another_size(made, tmp_path, capsys):
    path = tmp_path / "wide.png"
    mrcnf_says(capsys, "sample", made.run, "--n", 1, "--size", 4, 12, "--zoom", 1, "--out", path)
    assert read_image(path).shape == (1, 8, 16)  # a border of two pixels


def test_an_image_of_noise_is_read_as_such(made, tmp_path, capsys):
    noise = np.random.default_rng(0).bytes(500)
    (tmp_path / "noise.png").write_bytes(noise)
    out = tmp_path / "out"
    said = refused(capsys, "upscale", made.run, tmp_path / "noise.png", "--out", out)
    assert "noise.png: cannot be read" in said and not out.exists()
