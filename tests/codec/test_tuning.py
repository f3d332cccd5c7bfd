"""Settings that are found on images."""

from dataclasses import replace

import pytest
import torch
from small import PAPER, model, smooth

from mrcnf import codec
from mrcnf.codec import tuning
from mrcnf.codec.settings import LevelSettings, default
from mrcnf.errors import UserError
from mrcnf.runs import calibration


@pytest.fixture
def few_trials(monkeypatch):
    monkeypatch.setattr(tuning, "HALVES", {"euler": 4, "midpoint": 2})
    monkeypatch.setattr(tuning, "SPACINGS", (1.0,))


@pytest.mark.slow
def test_what_is_found_is_no_worse_than_the_defaults(few_trials):
    made = model(size=0.3)
    shares = []
    found, bits = tuning.tune(made, list(smooth(4, 4)), report=shares.append)
    assert shares[-1] == 1 and found.keys() == bits.keys() == {2, 4}
    assert all(after <= before for before, after in bits.values())
    # The numbers are those of a file's levels.
    again, _ = tuning.tune(made, list(smooth(4, 4)))
    assert again == found


def test_settings_that_cannot_code_are_passed_over(few_trials, monkeypatch):
    made, spent = model(), tuning._spent
    monkeypatch.setattr(
        tuning, "_spent",
        lambda own, levels, images: spent(own, levels, images) if levels[2].spacing == 2 else None,
    )  # fmt: skip
    found, _ = tuning.tune(made, list(smooth(2, 4)))
    assert {own.spacing for own in found.values()} == {2.0}


def test_a_level_keeps_what_was_found_beside_its_weights(tmp_path):
    made, other = model(field=PAPER), model(field=PAPER)
    own = {"steps": 3, "spacing": 1.5, "method": "heun", "sigma": 0.03, "growth": 0.2}
    made.level(4).coding = own
    calibration.save(tmp_path, made.level(4))
    calibration.attach(tmp_path, other.level(4))
    assert default(other).levels[4] == LevelSettings(**own)
    assert default(other).levels[2] == default(model()).levels[2]
    coded = codec.encode(other, smooth(2, 4), verify=False, bound=False)
    # Whoever has not calibrated the model decodes it all the same.
    assert all(map(torch.equal, codec.decompress(model(field=PAPER), coded.data), smooth(2, 4)))
    calibration.detach(other.level(4))
    assert default(other) == default(model())


def test_other_levels_keep_their_settings(few_trials):
    made = model(size=0.3)
    found, _ = tuning.tune(made, list(smooth(2, 4)), [2])
    assert found[4] == default(made).levels[4]


def test_a_model_that_cannot_code_is_one_line(few_trials):
    made = model()
    for weight in made.level(4).parameters():
        weight.fill_(float("nan"))
    with pytest.raises(UserError, match="cannot code"):
        tuning.tune(made, list(smooth(2, 4)))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"colour": 1}])
def test_kept_settings_are_checked(wrong):
    made = model()
    made.level(2).coding = wrong
    with pytest.raises(UserError, match=r"level 2: .* run `mrcnf calibrate` again"):
        default(made)


def test_trials_take_no_more_network_calls_than_the_defaults():
    calls = {"euler": 2, "midpoint": 4}
    own = LevelSettings()
    for change in tuning._changes():
        changed = change(own)
        assert calls[changed.method] * changed.steps <= calls["euler"] * own.steps
        own = replace(own, **{name: getattr(changed, name) for name in ("spacing", "sigma")})
