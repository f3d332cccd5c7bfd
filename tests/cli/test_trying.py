"""The commands that try a model on images that it should find strange."""

import json

import numpy as np
import pytest
from terminal import mrcnf_says, refused
from tiny import smooth_images, write_npz

import mrcnf
from mrcnf.data.imagefile import read_image, save_image
from mrcnf.measure.attack import attack


def test_attack_writes_what_it_says(made, tmp_path, capsys):
    said = mrcnf_says(
        capsys, "attack", made.run, "--epsilon", 1, 3, "--limit", 4, "--steps", 3,
        "--transfer", made.run, "--json", tmp_path / "new/attack.json",
        "--save", tmp_path / "attacked.npz", "--plot", tmp_path / "steps.png",
    )  # fmt: skip
    assert said.startswith("4 images of npz:") and "random signs" in said
    rows = json.loads((tmp_path / "new/attack.json").read_text())["rows"]
    assert [row["epsilon"] for row in rows] == [1, 3]
    for row in rows:
        assert row["transferred"] == row["attacked"] != row["natural"] != row["random"]
        assert {"resolution", "increase", "random_increase"} <= set(row["levels"][0])
        assert [point["steps"] for point in row["curve"]] == [1, 2, 3]
        assert (row["steps"], row["images"], row["step_size"]) == (3, 4, row["epsilon"])
    saved = np.load(tmp_path / "attacked-e3.npz")["images"].transpose(0, 3, 1, 2)
    pixels = smooth_images(12, seed=1)[:4]
    expected = attack(mrcnf.load(made.run), pixels, epsilon=3, steps=3).pixels
    assert np.array_equal(saved, expected)
    assert len(read_image(tmp_path / "steps.png", channels=3).flatten(1).T.unique(dim=0)) > 20


def test_attacked_images_can_be_evaluated_and_compressed(made, tmp_path, capsys):
    path = tmp_path / "attacked.npz"
    mrcnf_says(capsys, "attack", made.run, "--epsilon", 2, "--limit", 3, "--steps", 1,
               "--minimise", "--save", path)  # fmt: skip
    pytest.importorskip("constriction")
    mrcnf_says(capsys, "compress", made.run, path, "--out", tmp_path / "a.mrc", "--steps", 2)


def test_ood_writes_what_it_says(made, tmp_path, capsys):
    said = mrcnf_says(
        capsys, "ood", made.run, "--against", "noise", "--limit", 8,
        "--json", tmp_path / "ood.json", "--plot", tmp_path / "scores.png",
    )  # fmt: skip
    table = json.loads((tmp_path / "ood.json").read_text())
    assert set(table["auroc"]) == set(table["interval"]) == {
        "likelihood", "level-2", "level-4", "complexity", "typicality"
    }  # fmt: skip
    assert table["images"] == [8, 8] and table["codec"] in said
    for score, (low, high) in table["interval"].items():
        assert low <= table["auroc"][score] <= high
    assert len(read_image(tmp_path / "scores.png", channels=3).flatten(1).T.unique(dim=0)) > 20


@pytest.mark.parametrize("against", ["constant", "patches:2", "the data"])
def test_ood_against(made, tmp_path, capsys, against):
    against = write_npz(tmp_path / "other") if against == "the data" else against
    path = tmp_path / "ood.json"
    mrcnf_says(capsys, "ood", made.run, "--against", against, "--scores", "likelihood",
               "--json", path)  # fmt: skip
    assert list(json.loads(path.read_text())["auroc"]) == ["likelihood"]


def test_grey_images_are_repeated_for_a_model_of_colour(made, tmp_path, capsys):
    colour = write_npz(tmp_path / "colour", channels=3)
    config = tmp_path / "tiny.toml"
    config.write_text(made.config.read_text())
    mrcnf_says(capsys, "train", config, "--out", tmp_path / "run", f'data.name="{colour}"',
               "train.steps=1")  # fmt: skip
    grey = write_npz(tmp_path / "grey")
    said = mrcnf_says(capsys, "ood", tmp_path / "run", "--against", grey, "--limit", 4)
    assert "against 4 of npz:" in said
    assert "3 channel(s) but" in refused(capsys, "ood", made.run, "--against", colour)


def test_without_training_images_there_is_no_typicality(run, tmp_path, capsys):
    other = write_npz(tmp_path / "other")
    for config in run.rglob("config.toml"):
        text = config.read_text()
        (line,) = [row for row in text.splitlines() if row.startswith("name = \"npz:")]
        config.write_text(text.replace(line, 'name = "npz:nowhere"'))
    how = ["ood", run, "--data", other, "--against", "noise", "--limit", 4]
    assert "typicality is left out" in mrcnf_says(capsys, *how)
    assert "nowhere" in refused(capsys, *how, "--scores", "typicality")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attack", "--epsilon", "0"], "grey levels from 1 to 255, got 0"),
        (["attack", "--epsilon", "1.5"], "epsilon"),
        (["attack", "--steps", "0"], "steps of an attack"),
        (["attack", "--limit", "1"], "at least 2"),
        (["attack", "--limit", "-1"], "limit"),
        (["attack", "--plot", "a.txt"], ".png"),
        (["attack", "--save", "a.zip"], ".npz"),
        (["attack", "--transfer", "nowhere"], "nowhere"),
        (["attack", "train.steps=3"], "train cannot be changed"),
        (["ood"], "against"),
        (["ood", "--against", "nosie"], "constant, noise, patches:P"),
        (["ood", "--against", "patches:3"], "patches of 3×3"),
        (["ood", "--against", "patches:"], "patches:4"),
        (["ood", "--against", "noise", "--scores", "likelyhood"], "did you mean likelihood"),
        (["ood", "--against", "noise", "--batch", "0"], "batch"),
        (["ood", "--against", "noise", "--limit", "1"], "at least 2"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_line(made, capsys, arguments, words):
    command, *rest = arguments
    assert words in refused(capsys, command, made.run, *rest)


def test_images_of_other_sizes_are_one_clear_line(made, tmp_path, capsys):
    larger = write_npz(tmp_path / "six", side=6)
    assert "6" in refused(capsys, "attack", made.run, "--data", larger)
    assert "6" in refused(capsys, "ood", made.run, "--against", larger)
    save_image(tmp_path / "photos/test/a.png", smooth_images(1, channels=3, side=8)[0])
    for command in (["attack"], ["ood", "--against", "noise"]):
        said = refused(capsys, *command, made.run, "--data", f"folder:{tmp_path / 'photos'}")
        assert "3 channel(s)" in said
