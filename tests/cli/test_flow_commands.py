"""The commands on runs of couplings and split flows."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from terminal import mrcnf_says, refused
from tiny import TINY, files, smooth_images, trained, write_npz

import mrcnf
from mrcnf import cli
from mrcnf.data.imagefile import read_image, save_image
from mrcnf.measure import evaluate as evaluation
from mrcnf.measure.entropy import entropies
from mrcnf.report import plot
from mrcnf.runs import calibration

TABLE = """\
[flow]
kind = "coupling"
couplings = 2
splits = 1
shuffle = "context"
prior = "conditional"
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A configuration of split couplings of levels 4 and 8, and its run; not to be changed."""
    folder = tmp_path_factory.mktemp("split")
    text = TINY.format(data=write_npz(folder / "data", side=8)) + TABLE
    text = text.replace("[2, 4]", "[4, 8]").replace("[train]", '[train]\nobjective = "likelihood"')
    (folder / "split.toml").write_text(text)
    cli.main(["train", str(folder / "split.toml"), "--out", str(folder / "run")])
    return SimpleNamespace(config=folder / "split.toml", run=folder / "run", folder=folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of couplings alone; not to be changed."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "tiny.toml").write_text(TINY.format(data=write_npz(folder / "data")))
    settings = ["train.objective=likelihood", "flow.kind=coupling", "flow.couplings=1"]
    cli.main(["train", str(folder / "tiny.toml"), "--out", str(folder / "run"), *settings])
    return folder / "run"


def test_entropy_says_and_writes_what_leaves_and_what_stays(split, tmp_path, capsys):
    said = mrcnf_says(
        capsys, "entropy", split.run, "--limit", 9, "--batch", 4,
        "--json", tmp_path / "new/found.json", "--out", tmp_path / "figure.png",
    )  # fmt: skip
    lines = said.splitlines()
    assert lines[0].startswith(f"{split.run}, 9 images of npz:") and len(lines) == 3
    assert [re.search(r"level \d, split \d", line)[0] for line in lines[1:]] == [
        "level 4, split 1", "level 8, split 1"
    ]  # fmt: skip
    pixels = smooth_images(12, side=8, seed=1)[:9]
    expected = [s.to_dict() for s in entropies(mrcnf.load(split.run), pixels, batch=4)]
    assert json.loads((tmp_path / "new/found.json").read_text()) == {str(split.run): expected}
    figure = read_image(tmp_path / "figure.png", channels=3)
    assert len(figure.flatten(1).T.unique(dim=0)) > 20


def test_entropy_of_other_images(split, tmp_path, capsys):
    other = write_npz(tmp_path / "other", side=8, count=20)
    said = mrcnf_says(capsys, "entropy", split.run, "--data", other, "--limit", 0)
    assert f"20 images of {other}" in said
    said = mrcnf_says(capsys, "entropy", split.run, f'data.name="{other}"')
    assert f"20 images of {other}" in said


@pytest.mark.parametrize("setting", ["field.width=9", "solver.step=5", "train.steps=3"])
def test_entropy_refuses_what_it_would_ignore(split, capsys, setting):
    refused(capsys, "entropy", split.run, setting)


def test_runs_of_one_name_are_two_in_the_figure(split, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "split_entropies", lambda path, runs: drawn.append(runs))
    other = shutil.copytree(split.run, tmp_path / "other" / "run")
    mrcnf_says(capsys, "entropy", split.run, other, "--out", tmp_path / "figure.png")
    assert len(drawn[0]) == 2


def test_what_entropy_cannot_look_at_is_one_line(split, plain, made, tmp_path, capsys):
    for run in (plain, made.run):
        said = refused(capsys, "entropy", run)
        assert "no level of this run has a split flow" in said
    assert "no runs to look at" in refused(capsys, "entropy")
    assert "no run folder" in refused(capsys, "entropy", tmp_path / "nowhere")
    assert "png" in refused(capsys, "entropy", split.run, "--out", tmp_path / "figure.txt").lower()
    assert list(tmp_path.iterdir()) == []


def test_refinements_of_no_solver_are_refused_before_the_work(
    plain, split, made, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", None)
        for run in (plain, split.run):
            said = refused(capsys, "evaluate", run, "--convergence")
            assert "no level of this run has a solver" in said
    said = mrcnf_says(capsys, "evaluate", made.run, "--convergence", "--limit", 2)
    assert said.count("midpoint") >= 3


def test_evaluation_names_no_solver(plain, tmp_path, capsys):
    path = tmp_path / "numbers.json"
    said = mrcnf_says(capsys, "evaluate", plain, "--json", path)
    table = json.loads(path.read_text())
    assert (table["solver"], table["trace"]) == ("no solver: one pass", "exact")
    assert [level["nfe"] for level in table["levels"]] == [1, 1]
    assert said.count("no solver: one pass") == 2


def test_a_convergence_of_mixed_levels_refines_what_is_solved(made, tmp_path, capsys):
    settings = ["train.objective=likelihood", "flow.kind=coupling", "--level", 4]
    mrcnf_says(capsys, "train", made.config, "--out", tmp_path / "upper", *settings)
    parts = [tmp_path / "lower", tmp_path / "upper"]
    mrcnf_says(capsys, "train", made.config, "--out", parts[0], "--level", 2)
    mrcnf_says(capsys, "assemble", *parts, "--out", tmp_path / "run")
    path = tmp_path / "numbers.json"
    mrcnf_says(capsys, "evaluate", tmp_path / "run", "--convergence", "--json", path)
    table = json.loads(path.read_text())
    assert len(table["convergence"]) == 3
    assert len({row["solver"] for row in table["convergence"]}) == 3
    upper = {row["levels"][1] for row in table["convergence"]}
    assert len(upper) == 1
    assert len({row["levels"][0] for row in table["convergence"]}) == 3


def test_info_says_which_flow(split, made, capsys):
    said = mrcnf_says(capsys, "info", split.run)
    flow = "coupling × 2 flow, 1 splits (shuffle context, prior conditional); field: kind residual"
    assert said.count(flow) == 2
    assert "continuous flow; field: kind residual" in mrcnf_says(capsys, "info", made.run)


def test_sampling_and_upscaling_with_split_flows(split, tmp_path, capsys):
    path = tmp_path / "grid.png"
    sizes = []
    for temperature in (0, 1):
        mrcnf_says(capsys, "sample", split.run, "--n", 2, "--out", path, "--zoom", 1,
                   "--temperature", temperature, "--seed", 3)  # fmt: skip
        sizes.append(read_image(path))
    assert sizes[0].shape == sizes[1].shape and not torch.equal(*sizes)
    generator = torch.Generator().manual_seed(3)
    cold = mrcnf.load(split.run).sample(2, temperature=0.0, generator=generator)
    assert torch.equal(cold[0], cold[1])
    save_image(tmp_path / "small.png", smooth_images(1, side=4)[0])
    mrcnf_says(capsys, "upscale", split.run, tmp_path / "small.png", "--out", tmp_path / "up")
    assert read_image(tmp_path / "up/small-draw-1.png").shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["flow.splits=3"], "4×4 positions, which cannot be halved 4 times; lower flow.splits"),
        (["train.objective=flow-matching"], "flow matching trains a velocity"),
        (["field.kind=paper"], "field.kind = paper is of continuous flows"),
        (["flow.splits=0"], "flow.shuffle = context is of split flows; set flow.splits to 1"),
        (["flow.kind=spline"], "flow.kind 'spline': choose one of continuous, coupling"),
        (["flow.shuffle=sorted"], "choose one of none, random, learned, entropy, context"),
    ],
)  # fmt: skip
def test_wrong_combinations_are_one_clear_line(split, tmp_path, capsys, settings, words):
    said = refused(capsys, "train", split.config, "--out", tmp_path / "run", *settings)
    assert re.search(words.replace(".", r"\."), said)
    assert not (tmp_path / "run").exists()


def test_a_run_is_extended_by_the_same_flow(split, tmp_path, capsys):
    bigger = write_npz(tmp_path / "data", side=16)
    mrcnf_says(capsys, "extend", split.run, "--out", tmp_path / "new", "--resolution", 16,
               f"data.name={bigger}", "train.steps=2")  # fmt: skip
    said = mrcnf_says(capsys, "info", tmp_path / "new")
    assert "level 16" in said and "shuffle context" in said.splitlines()[-1]


@pytest.mark.slow
def test_the_command_writes_heads_beside_the_weights(tmp_path, capsys):
    data = write_npz(tmp_path / "data")
    run = trained(tmp_path / "run", f"data.name={data}")
    before = files(run)
    said = mrcnf_says(capsys, "calibrate", run, "--steps", "3", "--images", "1")
    assert "level 2:" in said and "level 4:" in said
    written = {path for path in files(run) if path not in before}
    assert {path.name for path in written} == {calibration.HEADS} and len(written) == 2
    assert {path: files(run)[path] for path in before} == before
    assert mrcnf.load(run).level(4).flow.fields[0].near is not None


def test_what_cannot_be_calibrated_is_one_line(tmp_path, capsys):
    run = trained(tmp_path / "run", "flow.kind=coupling", "train.objective=likelihood")
    assert "no continuous flow" in refused(capsys, "calibrate", run)
    assert "at least 1" in refused(capsys, "calibrate", run, "--steps", "0")
    assert "no level 8" in refused(capsys, "calibrate", run, "--level", "8")


def test_half_copies_of_a_calibrated_run_open_with_its_heads(tmp_path, capsys):
    run = trained(tmp_path / "run", f"data.name={write_npz(tmp_path / 'data')}")
    evaluation = "evaluate", run, "--limit", "2", "trace.method=calibrated"
    assert "mrcnf calibrate" in refused(capsys, *evaluation)
    mrcnf_says(capsys, "calibrate", run, "--steps", "2", "--images", "0")
    for level in ([], ["--level", "2"]):
        assert "trace calibrated, 1 rademacher" in mrcnf_says(capsys, *evaluation, *level)
    mrcnf_says(capsys, "assemble", run, "--out", tmp_path / "half", "--half")
    copy = mrcnf.load(tmp_path / "half")
    assert all(level.flow.fields[0].near is not None for level in copy)


def test_calibration_refuses_what_it_would_ignore(tmp_path, capsys):
    run = trained(tmp_path / "run")
    assert "solver has no part" in refused(capsys, "calibrate", run, "solver.steps=5")
