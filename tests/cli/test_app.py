"""The program: its commands, its arguments, one clear line for every mistake, exit statuses."""

import os
import re
import subprocess
import sys

import pytest
import torch
from terminal import mrcnf_says, refused
from tiny import files, write_npz

from mrcnf import cli
from mrcnf.cli import app
from mrcnf.errors import TrainingError
from mrcnf.flows.solve import SolverError
from mrcnf.runs import checkpoint


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for name in ("demo", "train", "extend", "evaluate", "sample", "upscale", "assemble", "info"):
        assert name in said
    listed = re.findall(r"• (\w+) ", said)
    assert listed == [
        "demo", "new", "pack", "train", "extend", "assemble", "calibrate", "evaluate", "sample",
        "upscale", "compress", "decompress", "info", "compare", "entropy", "attack", "ood", "check",
    ]  # fmt: skip


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
    assert app.gather_overrides(arguments) == [*arguments[:-1], "--overrides", "train.steps=2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "Missing from mrcnf train"),
        (["fly"], "no command 'fly'; choose one of demo, new"),
        (["evalute", "run"], "did you mean evaluate?"),
        (["sample", "run", "--colour", "red"], "--colour"),
        (["sample", "run", "--n", "many"], "--n"),
        (["info", "a", "b"], "Unrecognized options: b"),
    ],
)
def test_unknown_commands_and_flags_are_one_line(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


MISTAKES = {
    "too small to reduce": (
        "upscale {run} {folder}/1.png --reduce --out {out}", "is 1×1: it cannot be reduced by 2"
    ),
    "nothing finer": ("upscale {run} {folder}/8.png --level 4 --out {out}", "below the finest, 4"),
    "two of a name": ("upscale {run} {folder}/2.png {run}/2.jpg --out {out}", "/2.png and "),
    "two of a name but for case": (
        "upscale {run} {folder}/a.png {folder}/B.png {folder}/A.png --out {out}", "/A.png would"
    ),
    "a result over an image": (
        "upscale {run} {folder}/2.png {folder}/2-Draw-1.png --out {folder}", "choose another --out"
    ),
    "no temperature to upscale at": (
        "upscale {run} {folder}/2.png --temperature nan --out {out}", "temperature"
    ),
    "no temperature": ("sample {run} --temperature nan --out {out}.png", "temperature"),
    "an infinite temperature": ("sample {run} --temperature inf --out {out}.png", "temperature"),
    "a temperature below zero": ("sample {run} --temperature -1 --out {out}.png", "temperature"),
    "half a size": ("sample {run} --size 4 --out {out}.png", "--size"),
    "no size": ("sample {run} --size 0 4 --out {out}.png", "0×4"),
    "neighbours of another size": (
        "sample {run} --size 8 8 --neighbours 2 --out {out}.png", "leave out --size or --neighbours"
    ),
    "colour": ("upscale {run} {folder}/colour.png --out {out}", "3 channels where 1 are needed"),
    "no such level": ("upscale {run} {folder}/8.png --level 3 --out {out}", "level 3"),
    "no draws": ("upscale {run} {folder}/2.png --draws 0 --out {out}", "draws must be"),
    "no image": ("upscale {run} {folder}/none.png --out {out}", "none.png: there is no such"),
    "nothing to upscale": ("upscale {run} --out {out}", "no image to upscale"),
    "no samples": ("sample {run} --n 0 --out {out}.png", "n and zoom must be at least 1"),
    "fewer than no neighbours": ("sample {run} --neighbours -1 --out {out}.png", "not be negative"),
    "too many neighbours": (
        "sample {run} --neighbours 13 --out {out}.png", "more than the 12 images"
    ),
    "neighbours of no data": (
        "sample {run} --neighbours 2 data.name=npz:/none --out {out}.png", "/none"
    ),
    "settings without neighbours": (
        "sample {run} data.limit=3 --out {out}.png", "would ignore data"
    ),
    "other settings": (
        "sample {run} --neighbours 2 solver.steps=9 --out {out}.png", "ignore solver"
    ),
    "JPEG": ("sample {run} --n 2 --out {out}/a.jpg", "end the name in .png"),
    "unknown data": ("evaluate {run} --data cifar11 --json {out}", "'cifar11' is unknown"),
    "missing data": ("evaluate {run} --data npz:/none --json {out}", "/none"),
    "truncated data": ("evaluate {run} --data npz:{folder}/cut --json {out}", "test.npz"),
    "unknown split": ("evaluate {run} --split all --json {out}", "split 'all' is unknown"),
    "other channels": ("evaluate {run} --data npz:{folder}/colour --json {out}", "3 channel(s)"),
    "negative limit": ("evaluate {run} --limit -1 --json {out}", "limit must be at least 0"),
    "empty batch": ("evaluate {run} --batch 0 --json {out}", "evaluate.batch must be"),
    "unknown solver": ("evaluate {run} solver.method=rk5 --json {out}", "'rk5'"),
    "no run": ("evaluate {folder}/none --json {out}", "there is no run folder"),
    "not a run": ("sample {folder} --out {out}.png", "holds no trained level"),
    "no run to describe": ("info {folder}/none", "there is no run folder"),
    "no run to extend": ("extend {folder}/none --resolution 8", "there is no run folder"),
    "an unknown device": ("sample {run} --device gpu --out {out}.png", "unknown device 'gpu'"),
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


def test_a_damaged_run_is_named(run, capsys):
    path = run / "level-4" / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:-3])
    for command in (["sample", "--out", "x.png"], ["evaluate"], ["info"]):
        assert str(path) in refused(capsys, command[0], run, *command[1:])


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (torch.OutOfMemoryError("no memory"), 1, "halve the batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory:\nat 0x1"), 1, "halve the batch"),
        (TrainingError("it diverged"), 1, "it diverged"),
        (SolverError("level 4", "too stiff", 0.5, 0.1, 9), 1, "level 4: too stiff"),
        (KeyboardInterrupt(), 1, "interrupted"),
    ],
)
def test_other_failures_have_a_status_of_their_own(made, capsys, monkeypatch, error, status, words):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(checkpoint, "load", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", str(made.run)])
    assert stop.value.code == status and words in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_traceback(made):
    """As in `mrcnf info RUN | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "mrcnf", "info", str(made.run)],
        stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
