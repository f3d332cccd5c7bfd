"""The next level's configuration is the finest one's, where the levels below allow it."""

import shutil

import pytest
import torch
from tiny import images, trained

from mrcnf.errors import UserError
from mrcnf.runs import checkpoint
from mrcnf.runs.extend import extended_config
from mrcnf.training import trainer as train

TIED = ["model.dequantisation=gaussian", "field.lattice=true"]


def test_the_next_level_takes_the_finest_ones_settings(finished):
    settings = extended_config(finished, finished, 8, ["train.steps=9"])
    assert settings.model.resolutions == (2, 4, 8)
    assert (settings.train.steps, settings.train.batch, settings.train.init) == (9, 4, "")
    with pytest.raises(UserError, match="extend it to 8, not 16"):
        extended_config(finished, finished, 16)


@pytest.mark.parametrize("tie", TIED)
def test_noise_and_lattice_of_means_are_tied_to_the_finest_level(tmp_path, tie):
    run = trained(tmp_path / "run", tie, "train.steps=1")
    with pytest.raises(UserError, match=r"for 4×4 images.*model of 8×8; model\.pyramid = integer"):
        extended_config(run, run, 8)
    shutil.rmtree(run / "level-4")
    with pytest.raises(UserError, match=r"for 4×4 images.*model of 2×2"):
        checkpoint.load(run)
    # Integers are integers at every level.
    run = trained(tmp_path / "integers", tie, "model.pyramid=integer", "train.steps=1")
    assert extended_config(run, run, 8).model.resolutions == (2, 4, 8)


def test_learned_noise_is_the_finest_levels_and_hinders_no_growth(tmp_path):
    run = trained(tmp_path / "run", "model.dequantisation=variational", "train.steps=1")
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    assert [level.learned_noise is None for level in checkpoint.load(run).levels] == [True, False]
    taller = extended_config(run, run, 8)
    train.Trainer(taller, 8, images(side=8), run).run(progress=False)
    model = checkpoint.load(run)
    assert [level.learned_noise is None for level in model.levels] == [True, True, False]
    assert model.config.dequantisation == "variational"
    assert model.bits_per_dim(images(side=8).pixels[:2]).isfinite().all()
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    "change", ["model.nbits=4", "model.base=logit", "model.resolutions=[2,4,8,16]"]
)
def test_what_all_levels_share_cannot_be_changed_for_a_new_one(finished, change):
    name = change.partition("=")[0]
    with pytest.raises(UserError, match=rf"{name}.*does not fit the levels of"):
        extended_config(finished, finished, 8, [change])


def test_a_new_level_has_as_many_channels_as_the_levels_below(tmp_path, finished):
    settings = extended_config(finished, tmp_path, 8)
    assert settings.model.channels == 1
    with pytest.raises(UserError, match="3 channel"):
        train.Trainer(settings, 8, images(side=8, channels=3), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_new_level_may_start_from_the_one_below(tmp_path, finished):
    start = ["train.steps=1", "train.learning_rate=1e-9", "train.ema=0"]
    settings = extended_config(finished, tmp_path, 8, [f"train.init={finished}", *start])
    assert settings.train.init_level == 0
    with pytest.raises(UserError, match="no level 8"):
        train.Trainer(settings, 8, images(side=8), tmp_path / "same")
    settings = extended_config(
        finished, tmp_path, 8, [f"train.init={finished}", "train.init_level=4", *start]
    )
    trainer = train.Trainer(settings, 8, images(side=8), tmp_path)
    trainer.run(progress=False)
    below = checkpoint.load(finished).level(4)
    for (name, old), new in zip(
        below.named_parameters(), trainer.level.parameters(), strict=True
    ):
        torch.testing.assert_close(new, old, msg=name)
    torch.testing.assert_close(trainer.level.units.axes, below.units.axes)
    x = images(side=8).pixels.float() / 255
    values, _ = trainer.level.coefficients(x)
    spread = trainer.level.units(values)[0].std((0, 2, 3))
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0.05, atol=0)
    with pytest.raises(UserError, match=r"train\.init_level is of train\.init"):
        extended_config(finished, tmp_path, 8, ["train.init_level=4"])


def test_what_a_flow_found_at_its_start_is_kept_by_the_one_that_starts_from_it(tmp_path):
    kind = ["flow.kind=coupling", "flow.couplings=2", "train.objective=likelihood"]
    run = trained(tmp_path / "run", *kind)
    start = [f"train.init={run}", "train.init_level=4", "train.steps=1"]
    settings = extended_config(run, tmp_path, 8, [*start, "train.learning_rate=1e-9"])
    found = train.Trainer(settings, 8, images(side=8), tmp_path / "taller").level.flow
    below = checkpoint.load(run).level(4).flow
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, below.state_dict()[name], msg=name)
