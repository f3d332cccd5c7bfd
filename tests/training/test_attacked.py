"""Training on attacked images."""

import pytest
import torch
from tiny import images, metrics, smooth_images, tiny, trained
from trainers import same, weights

from mrcnf.errors import UserError
from mrcnf.measure.attack import random_signs
from mrcnf.training.objectives import Objective
from mrcnf.training.prepare import prepare_level

LIKELIHOOD = "train.objective=likelihood"
KINDS = {
    "flow matching": [],
    "flow matching, gaussian": ["model.dequantisation=gaussian"],
    "flow matching, variational": ["model.dequantisation=variational"],
    "continuous": [LIKELIHOOD],
    "couplings": [LIKELIHOOD, "flow.kind=coupling", "flow.couplings=1"],
    "integer couplings": [LIKELIHOOD, "flow.kind=coupling", "flow.couplings=1",
                          "model.pyramid=integer"],
}  # fmt: skip
ATTACKED = ["train.attack_share=0.5", "train.attack_epsilon=8", "train.attack_steps=2"]


def objective(*settings):
    config = tiny(*settings, *ATTACKED, "train.flip=false")
    level = prepare_level(config, 4, images()).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in level.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return Objective(level, config)


@pytest.mark.parametrize("name", KINDS)
def test_some_of_the_batch_are_moved_so_that_the_loss_grows(name):
    made, pixels = objective(*KINDS[name]), smooth_images(4)
    found = made._attacked(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(found[:2], pixels[:2])
    assert 4 < int((found.int() - pixels.int()).abs().max()) <= 8
    assert all(p.grad is None for p in made.parameters())

    def loss(changed):
        made.config = tiny(*KINDS[name], "train.flip=false")  # without attacks
        seeds = map(torch.Generator().manual_seed, range(40))
        with torch.no_grad():
            return sum(float(made(changed[2:], seed)[0]) for seed in seeds)

    assert loss(found) > loss(random_signs(pixels, 8))


def test_it_is_off_by_default_and_changes_the_weights(tmp_path):
    plain = trained(tmp_path / "plain", level=4)
    trained(tmp_path / "off", "train.attack_epsilon=9", "train.attack_steps=7", level=4)
    trained(tmp_path / "on", *ATTACKED, level=4)
    assert metrics(plain, 4) == metrics(tmp_path / "off", 4) != metrics(tmp_path / "on", 4)
    assert same(weights(plain, 4), weights(tmp_path / "off", 4))
    assert not same(weights(plain, 4), weights(tmp_path / "on", 4))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.attack_share=1.5"], r"train.attack_share must be in \[0, 1\]"),
        (["train.attack_share=0.1"], "is no image of a micro-batch of 4"),
        (["train.attack_epsilon=0"], "from 1 to 255"),
        (["train.attack_steps=0"], "at least 1"),
        (["train.attack_epsilon=1.5"], "whole number"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        tiny(*settings)
