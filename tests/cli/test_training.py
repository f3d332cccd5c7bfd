"""The commands that make a model: what each leaves behind."""

import shutil

import pytest
import torch
from terminal import mrcnf_says, refused
from tiny import files, write_npz

import mrcnf
from mrcnf.runs import checkpoint


def test_training_all_levels_makes_a_model(made):
    assert mrcnf.load(made.run).resolutions == (2, 4)


def test_training_one_level(made, tmp_path, capsys):
    mrcnf_says(capsys, "train", made.config, "--level", 4, "--out", tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["level-4"]
    mrcnf_says(capsys, "train", made.config, "--level", 2, "--out", tmp_path / "run")
    alone, together = mrcnf.load(tmp_path / "run"), mrcnf.load(made.run)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, together.state_dict()[name])


def test_the_run_is_named_after_the_configuration(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mrcnf_says(capsys, "train", made.config, "--level", 2, "train.steps=1")
    assert (tmp_path / "runs" / "tiny" / "level-2" / checkpoint.WEIGHTS).is_file()


def test_a_dry_run_prints_the_configuration_and_does_nothing(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = mrcnf_says(capsys, "train", made.config, "--dry-run", "--level", 4, "train.steps=99")
    (tmp_path / "said.toml").write_text(said)
    again = mrcnf_says(capsys, "train", tmp_path / "said.toml", "--dry-run")
    assert again == said and "\nsteps = 99\n" in said
    assert [p.name for p in tmp_path.iterdir()] == ["said.toml"]


def test_resuming_with_more_steps(made, run, capsys):
    mrcnf_says(capsys, "train", made.config, "--out", run, "--resume", "train.steps=6")
    assert {m["step"] for m in checkpoint.describe(run).values()} == {6}


def test_joint_training_gives_the_same_model(made, tmp_path, capsys):
    mrcnf_says(capsys, "train", made.config, "--out", tmp_path / "joint", "--joint")
    one, other = (mrcnf.load(r).state_dict() for r in (tmp_path / "joint", made.run))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("copied", [True, False])
def test_extending_leaves_the_old_levels_untouched(run, tmp_path, capsys, copied):
    data = write_npz(tmp_path / "larger", side=8)
    before = files(run)
    out = tmp_path / "extended" if copied else run
    more = ["--out", out] if copied else []
    mrcnf_says(capsys, "extend", run, "--resolution", 8, *more, f"data.name={data}")
    after = files(out)
    assert before.items() <= after.items()
    assert all(path.parts[0] == "level-8" for path in after.keys() - before.keys())
    assert mrcnf.load(out).resolutions == (2, 4, 8)
    if copied:
        assert files(run) == before
    assert mrcnf.load(out).sample(2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("copied", [True, False])
def test_an_interrupted_extension_resumes(run, tmp_path, capsys, copied):
    data = write_npz(tmp_path / "larger", side=8)
    out = tmp_path / "extended" if copied else run
    extend = ["extend", run, "--resolution", 8, *(["--out", out] if copied else [])]
    mrcnf_says(capsys, *extend, f"data.name={data}", "train.steps=2")
    if copied:
        shutil.rmtree(out / "level-2")  # as if killed while the old levels were copied
    said = refused(capsys, *extend)
    assert "already" in said
    mrcnf_says(capsys, *extend, "--resume", "train.steps=4")
    assert checkpoint.describe(out)[8]["step"] == 4
    assert mrcnf.load(out).resolutions == (2, 4, 8)


def test_extending_to_another_resolution_is_refused(run, capsys):
    before = files(run)
    assert "extend it to 8, not 16" in refused(capsys, "extend", run, "--resolution", 16)
    assert files(run) == before


def test_assembling(made, tmp_path, capsys):
    parts = []
    for level in (4, 2):
        parts.append(tmp_path / f"part-{level}")
        shutil.copytree(made.run / f"level-{level}", parts[-1] / f"level-{level}")
    said = mrcnf_says(capsys, "assemble", *parts, "--out", tmp_path / "whole")
    assert said.endswith("levels 2, 4\n")
    assert files(tmp_path / "whole") == files(made.run)


def test_assembling_half_copies(made, tmp_path, capsys):
    half = tmp_path / "half"
    said = mrcnf_says(capsys, "assemble", made.run, "--out", half, "--half")
    assert said.endswith("levels 2, 4\n")
    assert not list(half.rglob("state*"))
    mrcnf_says(capsys, "evaluate", half)
    before = files(half)
    said = refused(capsys, "train", made.config, "--out", half, "--resume", "train.steps=6")
    assert "no state to resume from" in said and files(half) == before


@pytest.mark.parametrize("mistake", ["data.name=npz:nothere", "train.crop=3", "train.device=mps"])
def test_growing_copies_nothing_before_all_is_right(made, tmp_path, capsys, mistake):
    out = tmp_path / "grown"
    refused(capsys, "extend", made.run, "--resolution", 8, "--out", out, mistake)
    assert not out.exists()
