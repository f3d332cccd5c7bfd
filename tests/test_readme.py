"""The README's commands and example are true."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from mrcnf import cli
from mrcnf.data.datasets import Images
from mrcnf.data.imagefile import save_image
from mrcnf.runs.checkpoint import describe
from mrcnf.runs.config import from_table
from mrcnf.training import trainer as train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BASH = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
        for line in block.splitlines()]  # fmt: skip
COMMANDS = [line.split("#")[0].strip() for line in BASH if line.startswith("mrcnf ")]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A barely trained 8-16-32 run at runs/demo, as the example expects."""
    folder = tmp_path_factory.mktemp("readme")
    pixels = torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8)
    table = {
        "field": {"width": 4, "depth": 1},
        "train": {"steps": 1, "batch": 4, "evaluate_every": 1},
        "solver": {"steps": 2},
    }
    for resolution in (8, 16, 32):
        images = Images(pixels, "noise", "train")
        run = folder / "runs/demo"
        train.Trainer(from_table(table), resolution, images, run, test=images).run(progress=False)
    split = {
        **table,
        "model": {"resolutions": [32]},
        "flow": {"kind": "coupling", "couplings": 1, "splits": 1},
        "train": {**table["train"], "objective": "likelihood"},
    }
    train.Trainer(from_table(split), 32, images, folder / "runs/splits").run(progress=False)
    return folder


@pytest.fixture(scope="module")
def workplace(tiny_run):
    """The files that the README's commands name, small."""
    (tiny_run / "experiments").symlink_to(ROOT / "experiments")
    (tiny_run / "runs/cifar10-cpu").symlink_to(tiny_run / "runs/demo")
    noise = torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8)
    for i, image in enumerate(noise):
        for split in ("train", "test"):
            save_image(tiny_run / f"photos/{split}/{i}.png", image)
    save_image(tiny_run / "photo.png", noise[0, :, :16, :16])
    return tiny_run


def test_the_python_example_runs(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert "(8, 16, 32)" in capsys.readouterr().out
    assert names["finer"].shape == (4, 1, 32, 32)
    assert names["path"].shape == (5, 1, 1, 32, 32)
    assert names["large"].shape == (1, 1, 90, 122)
    assert describe(names["run"])[8]["step"] == 20
    expected = -names["detail"][0].numel() / 2  # the divergence of -y/2
    assert names["divergence"].item() == pytest.approx(expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(command, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    words = shlex.split(command.replace("--n 64", "--n 4"))[1:]
    quick = {
        "train": ["--dry-run"], "extend": ["train.steps=1", "train.batch=2"],
        "compress": ["--steps", "2"], "attack": ["--steps", "2"], "report": ["--images", "4"],
    }  # fmt: skip
    cli.main([*words, *quick.get(words[0], [])])
    assert capsys.readouterr().out


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 9


def test_the_test_command_is_the_one_ci_runs():
    (command,) = [line for line in BASH if line.endswith("&& pytest")]
    assert command in (ROOT / ".ci/run").read_text()


def test_the_layout_has_a_line_for_every_file():
    layout = README.split("## Layout")[1]
    listed = re.findall(r"^    (mrcnf/[\w/]+\.py) ", layout, flags=re.MULTILINE)
    files = [p.relative_to(ROOT).as_posix() for p in (ROOT / "mrcnf").rglob("*.py")]
    empty = {"mrcnf/__main__.py", *(f for f in files if re.fullmatch(r"mrcnf/\w+/__init__.py", f))}
    assert sorted(listed) == sorted(set(files) - empty)


def test_every_recipe_of_the_experiments_table_exists():
    table = (ROOT / "experiments/README.md").read_text()
    named = set(re.findall(r"experiments/([\w-]+\.toml)", table))
    assert named == {path.name for path in (ROOT / "experiments").glob("*.toml")}
