"""The commands that begin with data: from a folder of photographs to a run that serves."""

import json

import numpy as np
import own_code
import pytest
import torch
from terminal import mrcnf_says, refused
from tiny import images, smooth_images, tiny

from mrcnf import cli, data
from mrcnf.data.imagefile import read_image, save_image
from mrcnf.runs import config as configuration
from mrcnf.training.trainer import Trainer


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Nine photographs of different sizes below the working directory."""
    for i in range(9):
        image = smooth_images(1, channels=3, side=30, seed=i)[0, :, : 12 + i, : 26 - 2 * i]
        save_image(tmp_path / "photos" / f"{i}.png", image)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_from_photographs_to_a_larger_one(place, capsys):
    arguments = ("--data", "folder:photos", "--resolutions", 2, 4, "--minutes", 0.001)
    said = mrcnf_says(capsys, "new", "mine", *arguments)
    assert "9 photographs of " in said and "Start:  mrcnf train mine.toml" in said
    assert "minutes here, on c" in said
    mrcnf_says(capsys, "train", "mine.toml", "train.device=cpu", "solver.steps=3")
    mrcnf_says(capsys, "evaluate", "runs/mine", "--json", "numbers.json", "solver.steps=2")
    assert json.loads((place / "numbers.json").read_text())["images"] > 2
    mrcnf_says(capsys, "upscale", "runs/mine", "photos/3.png", "--out", "larger", "--draws", 1)
    larger = next((place / "larger").glob("3-draw-1.png"))
    small = read_image(place / "photos" / "3.png")
    assert read_image(larger).shape == (3, 2 * small.shape[1], 2 * small.shape[2])
    assert "mine.toml is there already" in refused(capsys, "new", "mine", "--data", "photos")


def test_a_folder_beside_the_embedded_photographs_is_pointed_out(place, capsys):
    cli.main(["new", "mine", "--data", "photos", "--resolutions", "2", "--minutes", "0.001"])
    said = capsys.readouterr()
    assert "in the folder say folder:photos" in said.err and "mrcnf report runs/mine" in said.out


def test_packed_photographs_are_those_of_the_folder(place, capsys):
    for split in ("train", "test"):
        said = mrcnf_says(
            capsys, "pack", "folder:photos", "--out", f"packed/{split}.npy", "--split", split,
            "--resolution", 4, "--crop", 5, "--data.limit", 30,
        )  # fmt: skip
        packed = data.load("npy:packed", split)
        known = data.load("folder:photos", split, resolution=4, crop=5, limit=30)
        assert torch.equal(packed.pixels, known.pixels) and known.sha256[:12] in said
        assert torch.equal(packed.groups, known.groups)
        assert f"{len(known)} images of 3×4×4 of {len(known.groups.unique())} photograph" in said


def test_options_of_ones_own_data_are_heeded(place, capsys):
    own_code.write(place)
    given = ("--data.options.count", 7)
    said = mrcnf_says(capsys, "pack", "own:shades", "--out", "a.npy", "--resolution", 4, *given)
    assert "a.npy: 7 images of 1×4×4 from own:shades, train" in said
    more = ("--resolutions", 2, 4, "--minutes", 0.001)
    said = mrcnf_says(capsys, "new", "mine", "--data", "own:shades", *more, *given)
    assert "7 grey images of 4×4 to train on" in said
    assert configuration.load("mine.toml").data.options == {"count": 7}


def test_a_name_in_overrides_is_not_looked_for_in_a_run_that_is_not_trusted(place, capsys):
    for level in (2, 4):
        Trainer(tiny("train.steps=1"), level, images(), place / "run").run(progress=False)
    own_code.write(place / "run/level-4")
    said = refused(capsys, "extend", "run", "--resolution", 8, "data.name=own:shades")
    assert "there is no own.py in the current folder" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack", "folder:none", "--out", "x.npy"], "none: there is no such folder"),
        (["pack", "folder:photos", "--out", "x.npy", "--resolution", 13], "smaller than the"),
        (["pack", "folder:photos", "--out", "x.npy"], "give a resolution"),
        (["pack", "photos", "--out", "x.png"], "end the name in .npy"),
        (["pack", "photos", "--out", "x.npy", "train.steps=3"], "train is not asked for here"),
        (["pack", "npy:float.npy", "--out", "x.npy"], "holds float64"),
        (["pack", "photos", "--out", "x.npy", "--limit", -1], "data.limit must be at least 0"),
        (["pack", "photos", "--out", "test.npy"], "but it is train; add --split test, or choose"),
        (["new", "a/b c", "--data", "photos"], "use letters, digits"),
        (["new", "n", "--data", "photos", "--crop", 3], "data.crop is for a data.name of"),
        (["new", "n", "--data", "folder:none"], "none: there is no such folder"),
        (["new", "n", "--data", "folder:photos", "--minutes", -1], "must be more than 0"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(place, capsys, arguments, words):
    np.save("float.npy", np.zeros((2, 3, 4, 4)))
    assert words in refused(capsys, *arguments)
    assert sorted(p.name for p in place.iterdir()) == ["float.npy", "photos"]
