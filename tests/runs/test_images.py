"""Images for a run: of the model's size and channels, or a line says what differs."""

import subprocess
import sys

import pytest
from tiny import images, tiny, write_npz

from mrcnf.errors import UserError
from mrcnf.model.settings import ModelConfig
from mrcnf.runs.config import DataConfig
from mrcnf.runs.images import match_model, open_images


def test_images_have_the_models_size_and_the_limit_is_trainings(tmp_path):
    name = write_npz(tmp_path / "data", side=8)
    settings, model = DataConfig(name=name, limit=5), ModelConfig((2, 4))
    train = open_images(settings, model, "train")
    test = open_images(settings, model, "test")
    assert train.pixels.shape == (5, 1, 4, 4) and test.pixels.shape == (12, 1, 4, 4)
    assert len(open_images(DataConfig(name=name), model, "train")) == 12


def test_channels_are_the_datas_or_the_models(tmp_path):
    settings = DataConfig(name=write_npz(tmp_path / "data", channels=3))
    assert open_images(settings, ModelConfig((2, 4)), "test").pixels.shape[1] == 3
    with pytest.raises(UserError, match=r"has 3 channel.*model\.channels is 1"):
        open_images(settings, ModelConfig((2, 4), channels=1), "test")


def test_a_model_takes_the_datas_channels():
    model = tiny().model
    assert model.channels == 0
    for channels in (1, 3):
        matched = match_model(model, images(channels=channels))
        assert matched.channels == channels and matched.resolutions == model.resolutions
        assert match_model(matched, images(channels=channels)) == matched
    with pytest.raises(UserError, match="channel"):
        match_model(matched, images(channels=1))
    with pytest.raises(UserError, match=r"are 8×8 but the finest of model\.resolutions is 4"):
        match_model(model, images(side=8))


def test_opening_images_imports_no_training():
    code = (
        "import sys, mrcnf.runs.images; "
        "print(*[n for n in sys.modules if n.startswith(('mrcnf.training', 'mrcnf.measure'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
