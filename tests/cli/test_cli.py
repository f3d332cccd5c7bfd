"""The command line: what each command leaves behind, and one clear line for every mistake."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY, files, smooth_images, write_npz

import mrcnf
from mrcnf.cli import commands as cli
from mrcnf.data.imagefile import read_image, save_image
from mrcnf.report import plot
from mrcnf.runs import checkpoint


def mrcnf_says(capsys, *arguments):
    """What a command prints when it succeeds."""
    cli.main([str(a) for a in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The one line on stderr of a command that the user got wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("mrcnf: ")
    return said.err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A configuration, its data, a trained run and some images; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.toml").write_text(TINY.format(data=write_npz(folder / "data")))
    cli.main(["train", str(folder / "tiny.toml"), "--out", str(folder / "run")])
    for side in (2, 5, 8):
        save_image(folder / f"{side}.png", smooth_images(1, side=side)[0])
    save_image(folder / "colour.png", smooth_images(1, channels=3)[0])
    save_image(folder / "oblong.png", smooth_images(1, side=8)[0][:, :4])
    return SimpleNamespace(folder=folder, config=folder / "tiny.toml", run=folder / "run")


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made.run, tmp_path / "run")


# Training


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


@pytest.mark.parametrize(
    "spelling",
    [["train.steps=2"], ["--train.steps=2"], ["--train.steps", "2"]],
)
@pytest.mark.parametrize("front", [True, False])
def test_overrides_in_all_spellings_anywhere(made, capsys, spelling, front):
    rest = [str(made.config), "--dry-run"]
    order = [*spelling, *rest] if front else [*rest, *spelling]
    assert "\nsteps = 2\n" in mrcnf_says(capsys, "train", *order).partition("[train]")[2]


def test_paths_are_not_taken_for_overrides():
    arguments = ["a.toml", "./b.c/d=e.png", "/x.y=z", "--out", "A.b=c", "train.steps=2"]
    assert cli.gather_overrides(arguments) == [*arguments[:-1], "--overrides", "train.steps=2"]


# Using a run


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


def test_sampling(made, tmp_path, capsys):
    path = tmp_path / "grid.png"
    for out in (path, tmp_path / "again.png"):
        mrcnf_says(capsys, "sample", made.run, "--n", 5, "--out", out, "--zoom", 3, "--seed", 4)
    generator = torch.Generator().manual_seed(4)
    expected = plot.grid(mrcnf.load(made.run).sample(5, generator=generator), zoom=3)
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
    assert torch.equal(read_image(path), plot.grid(torch.cat(rows), columns=3, zoom=2))
    mrcnf_says(capsys, "sample", made.run, "--neighbours", 0, *arguments)
    assert torch.equal(read_image(path), plot.grid(samples, zoom=2))


def test_upscaling(made, tmp_path, capsys):
    said = mrcnf_says(
        capsys, "upscale", made.run, made.folder / "2.png", made.folder / "8.png",
        "--out", tmp_path, "--draws", 2,
    )  # fmt: skip
    names = {f"{side}-{what}.png" for side in (2, 8) for what in ("draw-1", "draw-2", "panel")}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert read_image(tmp_path / "2-draw-1.png").shape == (1, 4, 4)
    assert "8.png: reduced from 8×8 to level 2×2" in said and "2.png: reduced" not in said
    stated = [float(text) for text in re.findall(r"at most (\d+\.\d\d) grey levels", said)]
    inputs = read_image(made.folder / "2.png").double()
    for draw in (1, 2):
        result = read_image(tmp_path / f"2-draw-{draw}.png").double()
        difference = (torch.nn.functional.avg_pool2d(result, 2) - inputs).abs().max()
        assert float(difference) <= stated[0] + 0.005


def test_upscaling_a_reduced_image_shows_the_truth(made, tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(plot, "upscaling_panel", lambda *args: shown.append(args))
    arguments = ["--out", tmp_path, "--level", 2, "--draws", 1]
    mrcnf_says(capsys, "upscale", made.run, made.folder / "8.png", *arguments)
    mrcnf_says(capsys, "upscale", made.run, made.folder / "2.png", *arguments)
    (_, inputs, draws, truth), (_, _, _, none) = shown
    original = read_image(made.folder / "8.png").double()[None]
    for side, got in ((4, truth), (2, inputs)):
        means = torch.nn.functional.avg_pool2d(original, 8 // side)
        assert torch.equal(got, means.round().to(torch.uint8))
    assert draws.shape == (1, 1, 1, 4, 4) and none is None


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


def test_evaluation_refuses_what_it_would_ignore(made, capsys):
    for setting in ("field.width=9", "train.steps=3", "level.2.solver.steps=7"):
        said = refused(capsys, "evaluate", made.run, setting)
        assert "cannot be changed in a trained model" in said


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


def test_info_needs_only_the_weights(run, capsys):
    for path in run.rglob("*"):
        if path.is_file() and path.name != checkpoint.WEIGHTS:
            path.unlink()
    said = mrcnf_says(capsys, "info", run)
    level = mrcnf.load(run).level(4)
    count = sum(p.numel() for p in level.parameters())
    assert said.count("\n") == 2
    assert f"level 4: {count:,} parameters (kind residual, width 4, depth 1" in said
    assert "flow-matching, step 4 of 4" in said and "npz:" in said


def test_check_proves_the_numerics(tmp_path, capsys):
    said = mrcnf_says(capsys, "check", "--json", tmp_path / "check.json")
    findings = json.loads((tmp_path / "check.json").read_text())
    assert len(findings) == said.count("ok ") == said.count("\n") > 10
    assert all(finding["measured"] <= finding["bound"] for finding in findings)


def test_a_failed_check_is_an_error(capsys, monkeypatch):
    failed = cli.checks.Finding("two is one", 2.0, 1.0)
    monkeypatch.setattr(cli.checks, "run", lambda: iter([failed]))
    with pytest.raises(RuntimeError, match="check failed"):
        cli.main(["check"])
    assert capsys.readouterr().out.startswith("FAILED two is one: 2 (bound 1e+00)")


# Mistakes: exit status 2, one line, nothing written

MISTAKES = {
    "an oblong image": ("upscale {run} {folder}/oblong.png --out {out}", "oblong.png is 8×4"),
    "an odd size": ("upscale {run} {folder}/5.png --out {out}", "is 5×5"),
    "colour": ("upscale {run} {folder}/colour.png --out {out}", "3 channels where 1 are needed"),
    "no such level": ("upscale {run} {folder}/8.png --level 3 --out {out}", "level 3"),
    "no draws": ("upscale {run} {folder}/2.png --draws 0 --out {out}", "draws must be"),
    "no image": ("upscale {run} {folder}/none.png --out {out}", "none.png: there is no such"),
    "nothing to upscale": ("upscale {run} --out {out}", "no image to upscale"),
    "no samples": ("sample {run} --n 0 --out {out}", "n and zoom must be at least 1"),
    "fewer than no neighbours": ("sample {run} --neighbours -1 --out {out}", "not be negative"),
    "too many neighbours": ("sample {run} --neighbours 13 --out {out}", "more than the 12 images"),
    "neighbours of no data": (
        "sample {run} --neighbours 2 data.name=npz:/none --out {out}", "/none"
    ),
    "settings without neighbours": ("sample {run} data.limit=3 --out {out}", "would ignore data"),
    "other settings": ("sample {run} --neighbours 2 solver.steps=9 --out {out}", "ignore solver"),
    "JPEG": ("sample {run} --n 2 --out {out}/a.jpg", "end the name in .png"),
    "unknown data": ("evaluate {run} --data cifar11 --json {out}", "'cifar11' is unknown"),
    "missing data": ("evaluate {run} --data npz:/none --json {out}", "/none"),
    "truncated data": ("evaluate {run} --data npz:{folder}/cut --json {out}", "test.npz"),
    "unknown split": ("evaluate {run} --split all --json {out}", "split 'all' is unknown"),
    "other channels": ("evaluate {run} --data npz:{folder}/colour --json {out}", "3 channel(s)"),
    "negative limit": ("evaluate {run} --limit -1 --json {out}", "evaluate.limit must not"),
    "empty batch": ("evaluate {run} --batch 0 --json {out}", "evaluate.batch must be"),
    "unknown solver": ("evaluate {run} solver.method=rk5 --json {out}", "'rk5'"),
    "no run": ("evaluate {folder}/none --json {out}", "there is no run folder"),
    "not a run": ("sample {folder} --out {out}", "holds no trained level"),
    "no run to describe": ("info {folder}/none", "there is no run folder"),
    "no run to extend": ("extend {folder}/none --resolution 8", "there is no run folder"),
    "an unknown device": ("sample {run} --device gpu --out {out}", "unknown device 'gpu'"),
    "no configuration": ("train {folder}/none.toml --out {out}", "no configuration at"),
    "an unknown level": ("train {config} --level 8 --out {out}", "no level 8"),
    "an unknown setting": ("train {config} --out {out} train.stps=3", "did you mean train.steps?"),
    "an ill-typed setting": ("train {config} --out {out} train.steps=x", "must be a whole number"),
    "no value": ("train {config} --out {out} --train.steps", "--train.steps needs a value"),
    "unfit crops": ("train {config} --out {out} train.crop=3", "train.crop 3"),
    "too few pixels": ("train {config} --out {out} model.resolutions=[4,8]", "of 4×4 do not come"),
    "a folder in use": ("train {config} --out {run}", "add --resume"),
    "another model": ("train {config} --out {run} --resume field.width=5", "another model"),
    "a file for a folder": ("train {config} --out {config}/run", "choose another place"),
    "a file for a figure's folder": ("sample {run} --out {config}/a.png", "another place"),
    "a level twice": ("assemble {run} {run} --out {out}", "level 2 is in both"),
    "no levels": ("assemble --out {out}", "name at least one run"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(made, tmp_path, capsys, mistake):
    folder = made.folder
    if not (folder / "cut").exists():
        write_npz(folder / "cut")
        test = folder / "cut" / "test.npz"
        test.write_bytes(test.read_bytes()[:300])
        write_npz(folder / "colour", channels=3)
    before = files(folder)
    arguments, words = MISTAKES[mistake]
    names = {"run": made.run, "folder": folder, "config": made.config, "out": tmp_path / "out"}
    said = refused(capsys, *(word.format(**names) for word in arguments.split()))
    assert words in said
    assert files(folder) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "Missing from mrcnf train"),
        (["fly"], "no command 'fly'; choose one of demo, train"),
        (["evalute", "run"], "did you mean evaluate?"),
        (["sample", "run", "--colour", "red"], "--colour"),
        (["sample", "run", "--n", "many"], "--n"),
        (["info", "a", "b"], "Unrecognized options: b"),
    ],
)
def test_unknown_commands_and_flags_are_one_line(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_a_damaged_run_is_named(run, capsys):
    path = run / "level-4" / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:-3])
    for command in (["sample", "--out", "x.png"], ["evaluate"], ["info"]):
        assert str(path) in refused(capsys, command[0], run, *command[1:])


def test_an_image_of_noise_is_read_as_such(made, tmp_path, capsys):
    noise = np.random.default_rng(0).bytes(500)
    (tmp_path / "noise.png").write_bytes(noise)
    out = tmp_path / "out"
    said = refused(capsys, "upscale", made.run, tmp_path / "noise.png", "--out", out)
    assert "noise.png: cannot be read" in said and not out.exists()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (torch.OutOfMemoryError("no memory"), 1, "halve the batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory:\nat 0x1"), 1, "halve the batch"),
        (cli.training.TrainingError("it diverged"), 1, "it diverged"),
        (cli.SolverError("level 4", "too stiff", 0.5, 0.1, 9), 1, "level 4: too stiff"),
        (KeyboardInterrupt(), 1, "interrupted"),
    ],
)
def test_other_failures_have_a_status_of_their_own(made, capsys, monkeypatch, error, status, words):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(cli.checkpoint, "load", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", str(made.run)])
    assert stop.value.code == status and words in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for name in ("demo", "train", "extend", "evaluate", "sample", "upscale", "assemble", "info"):
        assert name in said


def test_pictures_open_elsewhere(made, tmp_path, capsys):
    mrcnf_says(capsys, "sample", made.run, "--n", 2, "--out", tmp_path / "a.png", "--zoom", 1)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "L" and image.size == (14, 8)
