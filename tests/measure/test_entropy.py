"""Entropies of what leaves split flows and of what stays."""

import math

import pytest
import torch
from tiny import images, trained

import mrcnf
from mrcnf.errors import UserError
from mrcnf.flows import shuffle
from mrcnf.measure.entropy import NORMAL, entropies
from mrcnf.model.level import Level
from mrcnf.model.settings import FieldConfig, FlowConfig, ModelConfig

SPLIT = ["train.objective=likelihood", "model.resolutions=[8]", "flow.kind=coupling",
         "flow.couplings=1", "flow.splits=2", "flow.prior=conditional"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = trained(tmp_path_factory.mktemp("run") / "run", *SPLIT, data=images(side=8))
    return mrcnf.load(run)


def test_every_split_is_reported(model):
    first, second = entropies(model, images(60, side=8).pixels, batch=17)
    assert [(s.resolution, s.split) for s in (first, second)] == [(8, 1), (8, 2)]
    assert [len(first.leaves), len(first.stays), len(first.leaves_under_model)] == [2, 2, 2]
    assert [len(second.leaves), len(second.stays), len(second.leaves_under_model)] == [4, 4, 4]
    table = first.to_dict()
    assert table["leaves"] == first.leaves and table["resolution"] == 8
    mean = sum(first.leaves) / 2
    assert f"level 8, split 1: 2 channels leave with {mean:.4f} nats a number" in str(first)


def test_what_batches_there_are_changes_only_the_noise(model):
    pixels = images(60, side=8).pixels
    whole, parts = (entropies(model, pixels, batch=batch) for batch in (60, 7))
    for one, other in zip(whole, parts, strict=True):
        assert one.leaves == pytest.approx(other.leaves, abs=0.1)
        assert one.leaves_under_model == pytest.approx(other.leaves_under_model, abs=0.1)
    again = entropies(model, pixels, batch=60)
    assert again == whole and entropies(model, pixels, batch=60, seed=1) != whole


def test_what_the_model_pays_adds_up_to_its_density(model):
    """Of all latents together, less the volume of the flows: what every split says is a part."""
    pixels = images(60, side=8).pixels
    first, second = entropies(model, pixels, batch=60)
    (level,) = model
    x = (pixels + 0.5) / 256
    y, condition, _ = level.prepare(x)
    one, two = level.flow.split(y, condition)
    prior = torch.distributions.Normal(two.mean, two.log_std.exp())
    paid = -prior.log_prob(two.leaves).mean((0, 2, 3))
    assert second.leaves_under_model == pytest.approx(paid.tolist(), abs=0.05)
    for split, found in ((one, first), (two, second)):
        rest = -split.log_prob.mean() / split.stays[0].numel()
        assert found.stays_under_model == pytest.approx(float(rest), abs=0.05)
        measured = shuffle.entropy(split.stays).tolist()
        assert found.stays == pytest.approx(measured, abs=0.2)


def test_a_prior_costs_no_less_than_the_entropy():
    """Of normal channels under the normal as much; of narrower ones more, by their divergence."""
    config = ModelConfig(resolutions=(4,), channels=1)
    flow = FlowConfig("coupling", couplings=1, splits=1)
    level = Level(config, 4, FieldConfig(width=4, depth=1), flow=flow)
    level.units.mean.fill_(0.5)
    level.units.std.fill_(0.25)
    pixels = torch.randint(0, 256, (4_000, 1, 4, 4), dtype=torch.uint8)
    (found,) = entropies([level], pixels, batch=1_000)
    # Uniform between -2 and 2 at rest.
    assert found.leaves == pytest.approx([math.log(4)] * 2, abs=0.05)
    assert found.stays == pytest.approx([math.log(4)] * 2, abs=0.05)
    pays = 0.5 * math.log(2 * math.pi) + 0.5 * 4 / 3
    assert found.leaves_under_model == pytest.approx([pays] * 2, abs=0.03)
    assert found.stays_under_model == pytest.approx(pays, abs=0.03)
    assert pays > math.log(4)
    assert pytest.approx(0.5 + 0.5 * math.log(2 * math.pi)) == NORMAL


def test_levels_without_splits_have_none(model, tmp_path):
    plain = mrcnf.load(trained(tmp_path / "run", "train.steps=1"))
    with pytest.raises(UserError, match=r"no level of this run has a split flow.*flow\.splits = 1"):
        entropies(plain, images().pixels)
    with pytest.raises(UserError, match="channel"):
        entropies(model, images(channels=3, side=8).pixels)
