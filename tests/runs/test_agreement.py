"""Levels that agree make a model; of those that do not, a line says what differs."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from ondisk import refused
from tiny import images, tiny, trained

import mrcnf
from mrcnf.errors import UserError
from mrcnf.model.level import Level
from mrcnf.model.settings import FlowConfig, ModelConfig
from mrcnf.runs import agreement, checkpoint
from mrcnf.runs.tensors import read_tensors, write_tensors
from mrcnf.training import trainer as train


def test_a_missing_level_is_named(tmp_path):
    three = ["model.resolutions=[2,4,8]", "train.steps=1"]
    for level in (2, 8):
        trained(tmp_path / "run", *three, data=images(side=8), level=level)
    message = refused("level 4 is missing", lambda: mrcnf.load(tmp_path / "run"))
    assert "--level 4" in message


@pytest.mark.parametrize(
    ("other", "data", "word"),
    [
        ([], images(channels=3), "channels"),
        (["model.nbits=5"], images(), "nbits is"),
        (["model.base=logit"], images(), "base is"),
        (["model.dequantisation=gaussian"], images(), "dequantisation is"),
        (["model.resolutions=[4]"], images(), "it is a base level"),
    ],
)
def test_levels_of_different_models_are_not_joined(finished, tmp_path, other, data, word):
    settings = ["train.steps=1", *other]
    level = data.pixels.shape[-1]
    alien = trained(tmp_path / "alien", *settings, data=data, level=level)
    mixed = shutil.copytree(finished / "level-2", tmp_path / "mixed" / "level-2")
    shutil.copytree(alien / f"level-{level}", mixed.parent / f"level-{level}")
    message = refused("belongs to another model", lambda: mrcnf.load(mixed.parent))
    assert word in message


def test_below_learned_noise_it_is_uniform(tmp_path):
    run = trained(tmp_path / "run", "model.dequantisation=variational", "train.steps=1")
    shutil.rmtree(run / "level-4")
    model = checkpoint.load(run)
    assert model.config.dequantisation == "uniform"
    assert model.bits_per_dim(images(side=2).pixels[:2]).isfinite().all()


def test_noise_is_learned_on_from_noise_only(tmp_path):
    run = trained(tmp_path / "run", "model.dequantisation=variational", "train.steps=1")
    flags = [f"train.init={run}", "model.dequantisation=variational"]
    train.Trainer(tiny(*flags), 4, images(), tmp_path / "on")
    with pytest.raises(UserError, match="learned noise is False, not True"):
        train.Trainer(tiny(*flags, "model.resolutions=[2]"), 2, images(side=2), tmp_path / "off")


OTHERS = {
    "channels": 3, "nbits": 5, "pyramid": "integer", "dequantisation": "gaussian", "base": "logit"
}  # fmt: skip


def origin(resolution, flow=None, **changes):
    """Of a level of a model of [2, 4], made with other settings."""
    settings = tiny()
    model = dataclasses.replace(settings.model, **{"channels": 1, **changes})
    path, flow = Path(f"level-{resolution}"), flow or settings.flow
    return agreement.Origin(path, resolution, model, settings.field, flow)


@pytest.mark.parametrize("key", agreement.SHARED)
def test_what_levels_share_makes_a_model_and_takes_over_weights(key):
    assert agreement.common_model([origin(2), origin(4)]) == origin(4).model
    level, alien = Level(origin(4).model, 4, tiny().field), origin(4, **{key: OTHERS[key]})
    agreement.check_weights(origin(4), False, level)
    for call in (
        lambda: agreement.common_model([origin(2), alien]),
        lambda: agreement.check_weights(alien, False, level),
    ):
        assert f"{key} is {OTHERS[key]!r}, not" in refused("level-4", call)


def test_whitening_is_a_levels_own():
    other = origin(4, whiten=False)
    assert agreement.common_model([origin(2), other]).resolutions == (2, 4)
    level = Level(origin(4).model, 4, tiny().field)
    assert "whiten is False" in refused(
        "level-4", lambda: agreement.check_weights(other, False, level)
    )


def test_flows_are_a_levels_own_and_weights_are_of_one_flow():
    coupling = FlowConfig("coupling")
    other = origin(4, flow=coupling)
    assert agreement.common_model([origin(2), other]).resolutions == (2, 4)
    level = Level(origin(4).model, 4, tiny().field)
    message = refused("level-4", lambda: agreement.check_weights(other, False, level))
    assert "its flow is" in message and "'kind': 'coupling'" in message
    agreement.check_weights(other, False, Level(origin(4).model, 4, tiny().field, flow=coupling))


def test_every_setting_of_a_model_is_shared_or_not():
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    assert known == {*agreement.SHARED, "resolutions", "whiten"}


@pytest.fixture
def rewritten(run):
    """Write the metadata of a run's level 4 anew, as `change` would have them."""

    def rewrite(change):
        path = run / "level-4" / checkpoint.WEIGHTS
        tensors, metadata = read_tensors(path)
        change(metadata)
        write_tensors(path, tensors, metadata)
        return run

    return rewrite


def test_settings_newer_than_a_file_have_their_defaults(rewritten, finished, tmp_path):
    def older(metadata):
        del metadata["field"]["lattice"], metadata["model"]["whiten"]

    run = rewritten(older)
    assert mrcnf.load(run).level(4).field == mrcnf.load(finished).level(4).field
    train.Trainer(tiny(f"train.init={run}"), 4, images(), tmp_path / "on")


@pytest.mark.parametrize(
    ("section", "change", "word"),
    [
        ("field", {"spin": 2}, "spin"),
        ("flow", {"spin": 2}, "spin"),
        ("flow", {"kind": "spline"}, "spline"),
        ("solver", {"spin": 2}, "spin"),
        ("trace", {"method": "guess"}, "guess"),
        ("model", {"pyramid": "laplacian"}, "laplacian"),
    ],
)
def test_settings_that_this_version_does_not_know_are_named(rewritten, section, change, word):
    run = rewritten(lambda metadata: metadata[section].update(change))
    path = run / "level-4" / checkpoint.WEIGHTS
    message = refused(path, lambda: mrcnf.load(run))
    assert "another version of mrcnf" in message and word in message
