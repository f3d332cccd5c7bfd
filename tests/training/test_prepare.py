"""Levels before their first step: what does not fit is refused, and nothing is written."""

import pytest
import torch
from tiny import images, tiny
from trainers import trainer_of

from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.training.prepare import prepare_level


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Images(torch.rand(9, 1, 4, 4), "floats", "train"), "uint8"),
        (images(channels=3), r"3 channel\(s\) but model.channels is 1"),
        (images(side=8), "8×8 but the finest of model.resolutions is 4"),
    ],
)
def test_unfit_images_are_refused_and_nothing_is_written(tmp_path, data, words):
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path / "run", "model.channels=1", data=data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.crop=3", "crop 3 must be a multiple of 2"),
        ("train.crop=6", "at most 4"),
        ("field.blocks=2", "flow matching trains one field"),
        ("train.device=gpu", "unknown device 'gpu'"),
        ("train.init=nowhere", "no run folder nowhere"),
    ],
)
def test_unfit_settings_are_refused_and_nothing_is_written(tmp_path, setting, words):
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path / "run", setting)
    assert not (tmp_path / "run").exists()


def test_a_level_begins_standardised_and_the_same_each_time():
    torch.manual_seed(1)
    level = prepare_level(tiny(), 4, images())
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))  # the global generator is left alone
    torch.manual_seed(2)
    again = prepare_level(tiny(), 4, images())
    for one, other in zip(level.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    y, *_ = level.prepare((images().pixels + 0.5) / 256)
    assert y.mean((0, 2, 3)).abs().max() < 0.1
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(3), rtol=0.1, atol=0)


def test_attention_is_not_trained_on_crops(tmp_path):
    """It would serve at another size than it was trained on."""
    with pytest.raises(UserError, match=r"train\.crop 2.*attention"):
        trainer_of(tmp_path / "run", "field.attention=true", "train.crop=2")
    assert not (tmp_path / "run").exists()
