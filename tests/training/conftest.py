"""A run that is not disturbed, to compare others with."""

from types import SimpleNamespace

import pytest
from tiny import TINY, write_npz

from mrcnf.runs import config
from mrcnf.runs.images import open_images
from mrcnf.training.trainer import Trainer


@pytest.fixture
def recipe(tmp_path):
    """A configuration file of level 4 with 300 steps, its data, and its undisturbed run."""
    text = TINY.format(data=write_npz(tmp_path / "data"))
    text = text.replace("steps = 4\n", "steps = 300\n").replace("_every = 2", "_every = 15")
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    settings = config.load(path)
    data = open_images(settings.data, settings.model, "train")
    Trainer(settings, 4, data, tmp_path / "whole").run(progress=False)
    return SimpleNamespace(path=path, whole=tmp_path / "whole", settings=settings, data=data)
