"""Evaluation: numbers that add up, with errors that are right."""

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from fields import awake
from tiny import images, trained

import mrcnf
from mrcnf import runtime, seeds
from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver, SolverError
from mrcnf.flows.trace import Trace
from mrcnf.image.noise import dequantise
from mrcnf.measure import evaluate
from mrcnf.model.level import Level

EXACT = Trace("exact")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two levels whose fields are not zero, in single precision."""
    run = trained(tmp_path_factory.mktemp("run") / "run", "train.steps=1")
    return awake(mrcnf.load(run)).float()


@pytest.fixture(scope="module")
def exact(model):
    """The same with the exact trace."""
    changed = copy.deepcopy(model)
    evaluate.set_solvers(changed, {"trace": {"method": "exact"}})
    return changed


def test_levels_add_up(model):
    result = evaluate.evaluate(model, images(), batch=5, draws=2)
    assert sum(level.bpd for level in result.levels) == pytest.approx(result.bpd, rel=1e-12)
    assert [level.resolution for level in result.levels] == [2, 4]
    assert result.images == 12 and result.draws == 2
    assert [level.nfe for level in result.levels] == [6, 6]  # midpoint, three steps


def test_bits_are_the_models_own(model, exact):
    result = evaluate.evaluate(exact, images(), batch=100, seed=3)
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    with torch.no_grad():
        bits = model.bits_per_dim(images().pixels, generator=generator, trace=EXACT)
    assert result.bpd == pytest.approx(float(bits.double().mean()), rel=1e-5)
    assert result.bpd_stderr == pytest.approx(float(bits.double().std() / math.sqrt(12)), rel=1e-4)


def test_an_untrained_identity_costs_what_a_normal_costs(tmp_path):
    settings = ["field.kind=paper", "train.steps=1", "train.learning_rate=1e-30"]
    level = mrcnf.load(trained(tmp_path / "run", *settings)).level(2)
    data = images()
    bits = evaluate.level_bits(level, data.pixels, seed=1)
    x, _ = dequantise(data.pixels, generator=seeds.generator(seeds.of_batch(1, 0)))
    coarse = x.reshape(12, 1, 2, 2, 2, 2).mean((3, 5))
    normal = torch.distributions.Normal(level.units.mean, level.units.std)
    nats = normal.log_prob(coarse).flatten(1).sum(1) - 4 * math.log(256)
    torch.testing.assert_close(bits, (-nats / (16 * math.log(2))).double(), rtol=1e-4, atol=1e-5)


def test_more_draws_average(model, exact):
    data = images()
    means = []
    for seed in range(2):  # the seeds of the first batch's two draws
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            means.append(model.bits_per_dim(data.pixels, generator=generator, trace=EXACT))
    both, _ = evaluate._bits(exact, data.pixels, 100, 2, 0)
    expected = torch.stack(means).mean(0).double()
    torch.testing.assert_close(both.sum(0), expected, rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_numbers(model):
    one, again = (evaluate.evaluate(model, images(), batch=5, seed=4) for _ in range(2))
    other = evaluate.evaluate(model, images(), batch=5, seed=5)
    assert (one.bpd, one.bpd_stderr, one.levels) == (again.bpd, again.bpd_stderr, again.levels)
    assert one.bpd != other.bpd


def test_an_images_bits_do_not_depend_on_its_batch_mates(model):
    """With the noise of the first batch held fixed, whoever else is in the batch."""
    pixels_ = images().pixels
    x, _ = dequantise(pixels_, generator=torch.Generator().manual_seed(0))
    for level in model:
        with torch.no_grad():
            together = level.log_prob(x, trace=EXACT).log_prob
            alone = torch.cat([level.log_prob(part, trace=EXACT).log_prob for part in x.split(5)])
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-4)


def test_the_batch_moves_the_mean_within_its_error(model):
    data = images(count=200)
    results = [evaluate.evaluate(model, data, batch=batch) for batch in (7, 200)]
    noise = math.hypot(*(result.bpd_stderr for result in results))
    assert 0 < abs(results[0].bpd - results[1].bpd) < 4 * noise


def test_the_limit_takes_the_first_images(model):
    data = images(count=30)
    first = Images(data.pixels[:8], data.name, data.split)
    limited = evaluate.evaluate(model, data, limit=8)
    assert limited.images == 8
    assert limited.bpd == evaluate.evaluate(model, first).bpd
    assert evaluate.evaluate(model, data, limit=99).images == 30


def test_a_stiff_field_ends_in_an_error_within_its_limit(model):
    stiff = copy.deepcopy(model)
    for level in stiff:
        level.solver = Solver("dopri5", steps=0, rtol=1e-6, atol=1e-6, max_evaluations=500)
        for parameter in level.parameters():
            parameter.mul_(8)
    with pytest.raises(SolverError, match=r"level 2.*\b50\d\b evaluations"):
        evaluate.evaluate(stiff, images())


def test_one_image_has_no_error(model):
    with pytest.raises(UserError, match="at least 2"):
        evaluate.evaluate(model, images(), limit=1)


def test_level_bits_are_the_levels_share(model, exact):
    data = images()
    shares, _ = evaluate._bits(exact, data.pixels, 5, 1, 2)
    for share, level in zip(shares, exact, strict=True):
        bits = evaluate.level_bits(level, data.pixels, batch=5, seed=2)
        torch.testing.assert_close(bits, share)


def test_standard_errors_of_independent_images():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    mean, error = evaluate.mean_and_error(values, None)
    variance = sum((v - 4) ** 2 for v in (1, 2, 4, 9)) / 3
    assert (mean, error) == pytest.approx((4.0, math.sqrt(variance / 4)))
    few = torch.tensor([0, 0, 1, 1])  # too few photographs to say anything about photographs
    assert evaluate.mean_and_error(values, few) == (mean, error)


def test_standard_errors_over_photographs_match_the_bootstrap():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 60, (600,), generator=generator)
    groups = torch.cat((groups, torch.arange(60)))  # each occurs, in unequal numbers
    shared = torch.randn(60, generator=generator)
    values = shared[groups] + 0.3 * torch.randn(len(groups), generator=generator)
    _, error = evaluate.mean_and_error(values, groups)
    sums = torch.zeros(60).index_add_(0, groups, values)
    counts = torch.zeros(60).index_add_(0, groups, torch.ones(len(groups)))
    drawn = torch.randint(0, 60, (4000, 60), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert error == pytest.approx(float(means.std()), rel=0.08)
    _, independent = evaluate.mean_and_error(values, None)
    assert error > 2 * independent


def test_the_names_of_groups_do_not_matter():
    values, groups = torch.randn(40), torch.arange(40) // 4
    error = evaluate.mean_and_error(values, groups)
    assert evaluate.mean_and_error(values, groups * 1000 - 7) == error


def test_convergence_refines_the_same_noise(model):
    rows = evaluate.convergence(model, images(), limit=6, refinements=3, seed=2)
    assert [row["solver"] for row in rows] == [str(Solver(steps=n)) for n in (3, 6, 12, 24)]
    assert rows[0]["difference"] == 0 and rows[0]["images"] == 6
    for before, row in pairwise(rows):
        assert row["difference"] == pytest.approx(row["bpd"] - before["bpd"], abs=1e-9)
        assert sum(row["levels"]) == pytest.approx(row["bpd"])
    assert abs(rows[3]["difference"]) < abs(rows[1]["difference"])  # second order
    assert [row["nfe"] for row in rows] == [[2 * n] * 2 for n in (3, 6, 12, 24)]


def test_settings_change_entries_of_every_levels_own_solver(model):
    changed = copy.deepcopy(model)
    changed.level(2).solver = Solver("rk4", steps=5)
    evaluate.set_solvers(changed, {"solver": {"steps": 2}, "trace": {"probes": 2}})
    result = evaluate.evaluate(changed, images())
    assert result.trace == "hutchinson, 2 rademacher"
    assert [level.nfe for level in result.levels] == [8, 4]  # rk4 stays at one, midpoint at other
    rows = evaluate.convergence(changed, images(), refinements=1)
    assert [row["nfe"] for row in rows] == [[8, 4], [16, 8]]


@pytest.mark.parametrize("wrong", [{"field": {"width": 9}}, {"level": {"2": {}}}])
def test_what_a_trained_model_is_made_of_cannot_be_changed(model, wrong):
    with pytest.raises(UserError, match="cannot be changed in a trained model"):
        evaluate.set_solvers(model, wrong)


@pytest.mark.parametrize(
    ("photographs", "over"), [(8, "photographs"), (3, "crops of few photographs")]
)
def test_the_error_says_what_it_is_over(model, photographs, over):
    data = images(count=24)
    grouped = Images(data.pixels, "n", "test", torch.arange(24) % photographs)
    assert evaluate.evaluate(model, grouped).error_over == over
    alone = Images(data.pixels[:5], "n", "test", torch.arange(5))
    assert evaluate.evaluate(model, alone).error_over == "images"


def test_the_json_says_everything(model):
    result = evaluate.evaluate(model, images())
    result.convergence = evaluate.convergence(model, images(), refinements=1)
    table = json.loads(result.to_json())
    assert {"bpd", "bpd_stderr", "images", "levels", "solver", "seconds"} <= table.keys()
    assert all({"resolution", "bpd", "nfe"} <= level.keys() for level in table["levels"])
    assert table["bpd"] == result.bpd and table["seconds"] > 0
    assert len(table["convergence"]) == 2
    assert f"{result.bpd:.4f} ± {result.bpd_stderr:.4f} bits/dim on 12 images" in str(result)


def test_a_tensor_serves_as_images(model):
    data = images()
    named, bare = (evaluate.evaluate(model, given, seed=3) for given in (data, data.pixels))
    assert (bare.bpd, bare.bpd_stderr, bare.levels) == (named.bpd, named.bpd_stderr, named.levels)
    assert "on 12 images of a tensor\n" in str(bare)


@pytest.mark.parametrize("wrong", [images(channels=3).pixels, images().pixels.float()])
def test_images_that_are_none_of_the_models_are_refused(model, wrong):
    with pytest.raises(UserError, match="images"):
        evaluate.evaluate(model, wrong)


def test_levels_are_compiled_when_asked(model, monkeypatch):
    compiled = []
    monkeypatch.setattr(Level, "compile", lambda level: compiled.append(level.resolution))
    monkeypatch.setattr(runtime, "require_compiler", lambda *_: compiled.append("able"))
    evaluate.evaluate(model, images())
    assert compiled == []
    evaluate.evaluate(model, images(), compile=True)
    assert compiled == ["able", 2, 4] or compiled == ["able", 2, "able", 4]


@pytest.mark.parametrize("size", [(5, 4), (6, 7)])
def test_images_of_a_size_that_the_levels_cannot_take_are_refused(model, size):
    with pytest.raises(UserError, match="multiples of 2"):
        evaluate.evaluate(model, torch.zeros(3, 1, *size, dtype=torch.uint8))


def test_images_of_another_size_are_evaluated_as_the_model_does(model):
    larger = images(count=4, side=8).pixels
    found = evaluate.evaluate(model, larger, batch=4, seed=2)
    generator = torch.Generator().manual_seed(2 * 1_000_003)
    expected = model.bits_per_dim(larger, generator=generator).mean()
    assert found.bpd == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"batch": 0}, {"limit": -1}, {"draws": -1}])
def test_numbers_of_nothing_are_refused(model, wrong):
    with pytest.raises(UserError, match=r"at least 1.*at least 0"):
        evaluate.evaluate(model, images(), **wrong)
