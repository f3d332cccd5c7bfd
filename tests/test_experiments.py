"""The recipes of experiments/: they load, have the sizes they claim, and read what they name."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mrcnf import cli
from mrcnf.model.level import Level
from mrcnf.runs import checkpoint, config

FOLDER = Path(__file__).parents[1] / "experiments"
RECIPES = sorted(path.name for path in FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load(name):
    settings = config.load(FOLDER / name)
    for resolution in settings.model.resolutions:
        assert settings.at_level(resolution).train.steps > 0


@pytest.mark.parametrize(
    "name, parameters",  # millions, as the paper's tables round them
    [("cifar10-paper-2", 1.3), ("cifar10-paper-3", 1.5), ("imagenet64-paper-3", 2.0)],
)
def test_the_papers_recipes_have_the_papers_sizes(name, parameters):
    settings = config.load(FOLDER / f"{name}.toml")
    model = dataclasses.replace(settings.model, channels=3)
    levels = [Level(model, r, settings.at_level(r).field) for r in model.resolutions]
    found = sum(p.numel() for level in levels for p in level.parameters())
    assert round(found / 1e6, 1) == parameters


@pytest.fixture
def imagenet(tmp_path):
    """Four images a file in the published layout, and 128×128 ones."""
    random = np.random.default_rng(0)
    parts = [f"train_data_batch_{i}" for i in range(1, 11)]
    for name in (*parts, "val_data"):
        pixels = random.integers(0, 256, (4, 3 * 64 * 64), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", data=pixels)
    (tmp_path / "imagenet128").mkdir()
    for split in ("train", "test"):
        pixels = random.integers(0, 256, (4, 128, 128, 3), dtype=np.uint8)
        np.savez(tmp_path / f"imagenet128/{split}.npz", data=pixels)
    return tmp_path


def test_the_papers_imagenet_models_train_on_the_published_files(imagenet, capsys):
    """Three levels at 64×64, and the fourth on top of them: in one step each, one block a level."""
    run = imagenet / "run"
    short = ["train.steps=1", "train.batch=2", "train.micro_batches=1", "field.blocks=1"]
    recipe = str(FOLDER / "imagenet64-paper-3.toml")
    cli.main(["train", recipe, "--out", str(run), "--data.root", str(imagenet), *short])
    cli.main(["extend", str(run), "--resolution", "128", "train.steps=1", "train.batch=1",
              f"data.name=npz:{imagenet}/imagenet128"])  # fmt: skip
    described = checkpoint.describe(run)
    assert [described[r]["parameters"] for r in (16, 32, 64, 128)] == [79_134, *[87_834] * 3]
    cli.main(["evaluate", str(run), "--limit", "2", "--batch", "1", "solver.rtol=1e-2",
              "solver.atol=1e-2"])  # fmt: skip
    assert "on 2 images of npz:" in capsys.readouterr().out
