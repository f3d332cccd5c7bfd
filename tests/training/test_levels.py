"""Levels trained together: the same as alone, on one copy of the data, tested on its like."""

import json

import numpy as np
import pytest
import torch
from tiny import TINY, files, images, metrics, smooth_images, tiny, trained, write_npz
from trainers import same, weights

from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.runs import checkpoint, config
from mrcnf.runs.images import open_images
from mrcnf.training import levels
from mrcnf.training.levels import train, train_levels
from mrcnf.training.trainer import Trainer


@pytest.mark.parametrize("joint", [True, False])
def test_levels_do_not_depend_on_each_other(tmp_path, joint):
    data = write_npz(tmp_path / "data")
    settings = tiny(f"data.name={data}", "level.4.train.steps=7")
    train_levels(settings, [2, 4], tmp_path / "run", joint=joint, progress=False)
    chosen = open_images(settings.data, settings.model, "train")
    for level in (2, 4):
        alone = tmp_path / f"alone-{level}"
        Trainer(settings, level, chosen, alone).run(progress=False)
        assert same(weights(tmp_path / "run", level), weights(alone, level))
        assert metrics(tmp_path / "run", level) == metrics(alone, level)


def test_a_folder_in_use_is_refused_before_another_level_is_begun(tmp_path):
    run = trained(tmp_path / "run", level=4)
    before = files(run)
    with pytest.raises(UserError, match=r"level-4.*add --resume"):
        train_levels(tiny("data.name=photos"), [2, 4], run)
    assert files(run) == before


@pytest.mark.parametrize("joint", [True, False])
def test_the_images_are_copied_to_the_device_once(tmp_path, monkeypatch, joint):
    copies = []

    class Counted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.to and isinstance(args[1], torch.device):
                copies.append((len(args[0]), args[1]))
            return super().__torch_function__(function, types, args, kwargs or {})

    counted = Images(images().pixels.as_subclass(Counted), "generated", "train")
    monkeypatch.setattr(levels, "open_images", lambda *_: counted)
    train_levels(tiny(), [2, 4], tmp_path / "run", joint=joint, progress=False)
    assert copies == [(12, torch.device("cpu"))]
    assert same(weights(tmp_path / "run", 4), weights(trained(tmp_path / "alone", level=4), 4))


def test_grey_levels_are_not_tested_on_colour_images(tmp_path):
    data = write_npz(tmp_path / "data")
    colour = smooth_images(channels=3).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "data" / "test.npz", images=colour)
    settings = tiny(f"data.name={data}", "train.evaluate_every=2")
    assert settings.model.channels == 0
    with pytest.raises(UserError, match=r"3 channel\(s\) but model.channels is 1"):
        train_levels(settings, [2, 4], tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_channels_of_the_data_stay_unsaid_in_the_configuration(tmp_path):
    """So that runs of earlier versions resume."""
    train_levels(tiny(f"data.name={write_npz(tmp_path / 'data')}"), [4], tmp_path, progress=False)
    assert config.load(tmp_path / "level-4" / checkpoint.CONFIG).model.channels == 0
    assert checkpoint.describe(tmp_path)[4]["model"]["channels"] == 1


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(TINY.format(data=write_npz(tmp_path / "data")))
    return path


def test_training_from_a_file_returns_the_run(recipe_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = train(str(recipe_file), overrides=["train.steps=3"], progress=False)
    assert str(run) == "runs/tiny"
    assert [checkpoint.describe(run)[level]["step"] for level in (2, 4)] == [3, 3]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="add --resume"):
        train(recipe_file, progress=False)
    assert train(recipe_file, resume=True, overrides=["train.steps=5"], progress=False) == run
    assert checkpoint.describe(run)[4]["step"] == 5


def test_training_from_a_config_is_training_its_levels(recipe_file, tmp_path):
    settings = config.load(recipe_file)
    train_levels(settings, [2, 4], tmp_path / "whole", progress=False)
    for level in (2, 4):
        run = train(settings, level, tmp_path / "parts", progress=False)
        assert checkpoint.describe(run)[level]["step"] == 4
    assert run == tmp_path / "parts"
    together = train(settings, out=str(tmp_path / "together"), joint=True, progress=False)
    shorter = train(settings, 4, tmp_path / "shorter", overrides=["train.steps=2"], progress=False)
    for level in (2, 4):
        assert same(weights(run, level), weights(tmp_path / "whole", level))
        assert same(weights(together, level), weights(tmp_path / "whole", level))
    assert list(checkpoint.describe(shorter)) == [4]
    assert json.loads((shorter / "level-4/metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_a_level_that_is_none_is_refused(recipe_file, tmp_path):
    with pytest.raises(UserError, match="there is no level 3"):
        train(recipe_file, 3, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("level.4.field.scales=9", "halved"),
        ("level.4.train.crop=3", "train.crop 3"),
        ("level.4.train.device=mps", "unknown device"),
    ],
)
def test_a_mistake_in_a_later_level_is_found_before_the_first_is_trained(tmp_path, mistake, words):
    data = write_npz(tmp_path / "data")
    with pytest.raises(UserError, match=words):
        train_levels(tiny(f"data.name={data}", mistake), [2, 4], tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
