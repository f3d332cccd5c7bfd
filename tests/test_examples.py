"""The examples of a user's own field, flow, data source and objective, through the commands."""

import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import metrics

import mrcnf
from mrcnf import cli
from mrcnf.codec import decompress, encode
from mrcnf.data.imagefile import read_image, save_image
from mrcnf.errors import UserError
from mrcnf.runs import checkpoint, config

EXAMPLES = Path(__file__).parents[1] / "examples"
TOY = ["train.steps=2", "train.batch=4", "train.warmup=1", "solver.steps=3"]
OWN = ["data.options.count=12", "train.sample_every=0", *TOY]


def say(*words):
    cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Toy runs of both examples; not to be changed."""
    folder = tmp_path_factory.mktemp("examples")
    say("train", EXAMPLES / "own.toml", "--out", folder / "own", *OWN)
    say("train", EXAMPLES / "own-flow.toml", "--out", folder / "flow", "data.limit=12", *TOY)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder without the examples' code, to be in."""
    monkeypatch.chdir(tmp_path)
    save_image(Path("small.png"), torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8))
    save_image(Path("large.png"), torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8))
    return tmp_path


def test_a_run_works_where_its_code_is_not_and_only_when_trusted(runs, workplace, capsys):
    words = ["evaluate", runs / "own", "--limit", "4"]
    with pytest.raises(SystemExit) as stop:
        say(*words)
    assert stop.value.code == 2
    (refusal,) = capsys.readouterr().err.splitlines()
    assert "my_field:Field" in refusal and "--trust" in refusal
    say(*words, "--trust", "--json", "numbers.json")
    assert "4 images of my_data:discs test" in capsys.readouterr().out
    say("info", runs / "own")
    say("compare", runs / "own", runs / "flow")
    said = capsys.readouterr().out
    assert "my_field:Field" in said and "my_objective:matching" in said and "my_flow:Flow" in said
    assert {path.name for path in (runs / "own/level-16").glob("*.py")} == {
        "my_data.py", "my_field.py", "my_objective.py"
    }  # fmt: skip


def test_an_own_flow_is_coded_by_its_steps(runs, workplace):
    model = mrcnf.load(runs / "flow", trust=True)
    images = [read_image("large.png"), read_image("large.png").flip(-1)]
    data = encode(model, images, names=["a", "b"], streams=2, workers=2).data
    assert all(map(torch.equal, decompress(model, data, workers=2), images))


def test_a_flow_without_steps_is_refused_by_the_codec_alone(runs, workplace, monkeypatch):
    model = mrcnf.load(runs / "flow", trust=True)
    for level in model:
        monkeypatch.delattr(type(level.flow), "steps", raising=False)
    assert model.sample(2).shape == (2, 1, 16, 16)
    with pytest.raises(UserError, match=r"level 8: a Flow defines no steps\(\), which"):
        encode(model, [read_image("large.png")], names=["a"])


def test_what_the_examples_say_is_what_their_configurations_hold():
    for path in EXAMPLES.glob("*.toml"):
        settings = config.load(path)
        assert f"mrcnf train examples/{path.name}\n" in path.read_text()
        assert f"runs/{settings.name}" in path.read_text()
        for name in config.own_names(settings):
            assert (EXAMPLES / name.partition(":")[0]).with_suffix(".py").is_file()


@pytest.mark.parametrize("setting", ["field.blocks=1", "field.blocks=2"])
def test_an_own_field_trains_by_likelihood_too(tmp_path, setting):
    overrides = [*OWN, "train.objective=likelihood", "train_solver.steps=1", setting]
    run = mrcnf.train(
        EXAMPLES / "own.toml", level=8, out=tmp_path / "run", overrides=overrides, progress=False
    )
    level = checkpoint.load_level(run, 8, trust=True)
    assert all(p.isfinite().all() for p in level.parameters())
    row = metrics(run, 8)[-1]
    assert row["frobenius"] > 0 and row["gradient_norm"] > 0


COMMANDS = {
    "evaluate": ["RUN", "--limit", "4"],
    "evaluate a level": ["RUN", "--level", "16", "--limit", "4"],
    "evaluate other images": ["RUN", "--data", "photos", "--limit", "4"],
    "sample": ["RUN", "--n", "2"],
    "sample beside neighbours": ["RUN", "--n", "2", "--neighbours", "1"],
    "upscale": ["RUN", "small.png", "--out", "larger", "--draws", "1"],
    "compress": ["RUN", "large.png", "--out", "image.mrc"],
    "attack": ["RUN", "--limit", "2", "--steps", "1", "--epsilon", "1"],
    "ood": ["RUN", "--against", "noise", "--limit", "4", "--scores", "likelihood", "typicality"],
    "assemble": ["RUN", "--out", "small", "--half"],
    "extend": ["RUN", "--resolution", "32", "--out", "grown", "train.steps=1", "train.batch=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("run", ["own", "flow"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_run_of_ones_own(command, run, runs, workplace, capsys):
    words = [runs / run if word == "RUN" else word for word in COMMANDS[command]]
    with pytest.raises(SystemExit):
        say(command.split()[0], *words)
    assert "--trust" in capsys.readouterr().err
    assert {path.name for path in workplace.iterdir()} == {"small.png", "large.png"}
    say(command.split()[0], *words, "--trust")
    assert capsys.readouterr().out
    if command == "compress":
        say("decompress", "image.mrc", "--run", runs / run, "--out", "back", "--trust")
        assert torch.equal(read_image("back/large.png"), read_image("large.png"))
    if command == "extend":
        assert (workplace / "grown/level-32/my_data.py").is_file() == (run == "own")
        assert len(list(mrcnf.load("grown", trust=True))) == 3


def test_nothing_of_the_examples_can_be_imported_by_chance():
    assert not {name for name in sys.modules if re.fullmatch(r"my_\w+", name)}
