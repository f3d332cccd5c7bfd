"""Seeds: the same for ever, as published numbers rest on them."""

import pytest
import torch

from mrcnf import seeds
from mrcnf.errors import UserError


def test_seeds_of_training_are_those_of_earlier_versions():
    assert seeds.seed_of(0, 4, "weights") == 6_508_632_752_144_335_115
    assert seeds.seed_of(7, 0, "epoch 3") == 5_264_164_869_319_585_391
    assert seeds.seed_of(0, 32, "12/1") == 8_053_759_711_373_732_437


def test_seeds_of_evaluation_are_those_of_earlier_versions():
    assert seeds.of_batch(0, 0) == 0
    assert seeds.of_batch(3, 5, 2) == 3 * 1_000_003 + 5 * 1009 + 2


def test_no_seed_serves_twice():
    uses = [(s, r, f"{step}/{piece}") for s in (0, 1) for r in (4, 8)
            for step in range(20) for piece in (0, 1)]  # fmt: skip
    assert len({seeds.seed_of(*use) for use in uses}) == len(uses)
    batches = [(s, b, d) for s in (0, 1, 2) for b in range(0, 991, 10) for d in range(0, 1009, 16)]
    assert len({seeds.of_batch(*batch) for batch in batches}) == len(batches)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_generator_begins_its_seeds_numbers(device):
    found = seeds.generator(5, device)
    assert found.device == torch.device("cpu") and found.initial_seed() == 5
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.rand(3, generator=found), expected)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_seeds_beyond_64_bits_are_refused(seed):
    with pytest.raises(UserError, match="64 bits"):
        seeds.generator(seed)
