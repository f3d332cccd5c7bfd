"""Heads that a codec asks: fitted, kept beside the weights, and worth their while."""

import pytest
import torch
from fields import awake
from tiny import images, trained

import mrcnf
from mrcnf.errors import UserError
from mrcnf.runs import calibration, checkpoint
from mrcnf.training.calibrate import calibrate


def test_a_fitted_head_explains_the_jacobian_and_travels_with_the_run(tmp_path):
    run = trained(tmp_path / "run")
    level = mrcnf.load(run).level(4)
    awake(level.flow, 0.15).float()  # hardly trained, there is little to learn
    left = []
    calibrate(level, images(), steps=200, report=lambda _, missed: left.append(missed))
    assert len(left) == 200
    assert sum(left[-16:]) < 0.9 * sum(left[:16])
    (field,) = level.flow
    calibration.save(checkpoint.level_folder(run, 4), level)
    again = mrcnf.load(run)
    (loaded,) = again.level(4).flow
    for name, value in field.near.state_dict().items():
        assert torch.equal(loaded.near.state_dict()[name], value)
    assert next(iter(again.level(2).flow)).near is None


def test_heads_of_another_level_are_refused(tmp_path):
    run = trained(tmp_path / "run")
    level = mrcnf.load(run).level(4)
    next(iter(level.flow)).near = next(iter(level.flow)).new_near()
    calibration.save(checkpoint.level_folder(run, 2), level)
    with pytest.raises(UserError, match="mrcnf calibrate"):
        mrcnf.load(run)


def test_levels_of_other_fields_are_refused(tmp_path):
    run = trained(tmp_path / "run", "field.kind=paper")
    with pytest.raises(UserError, match="no residual field"):
        calibrate(mrcnf.load(run).level(4), images())
