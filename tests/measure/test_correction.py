"""Few steps and what they are off by: the bits of many steps, at a price and with an error."""

import copy
import math

import pytest
import torch
from fields import awake
from tiny import images, trained

import mrcnf
from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.measure import correction, evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two levels whose fields bend, to be solved in twenty steps."""
    run = trained(tmp_path_factory.mktemp("run") / "run", "train.steps=1", "field.width=8")
    model = awake(mrcnf.load(run), 0.1).float()
    evaluate.set_solvers(model, {"solver": {"steps": 20}})
    return model


def test_corrected_bits_are_those_of_all_steps(model):
    many = images(300)
    exact, found = (evaluate.evaluate(model, many, tolerance=t) for t in (0.0, 3e-3))
    few = evaluate.bits_by_level(solved(model, steps=4), many.pixels).sum(0)
    assert found.levels[1].nfe == 8 and found.levels[1].solver.endswith("from 4")
    error = found.corrected["bpd_stderr"]
    assert 0 < error < 6e-3 and found.corrected["images"] < 150
    assert abs(found.bpd - exact.bpd) < 4 * error < abs(float(few.mean()) - exact.bpd) / 2
    assert sum(level.bpd for level in found.levels) == pytest.approx(found.bpd, rel=1e-12)
    assert found.bpd_stderr == pytest.approx(
        math.hypot(evaluate.mean_and_error(few, None)[1], error)
    )
    assert f"{found.corrected['bpd']:+.5f}" in str(found) and "corrects" not in str(exact)


def solved(model, **solver):
    """The same, solved otherwise."""
    changed = copy.deepcopy(model)
    evaluate.set_solvers(changed, {"solver": solver})
    return changed


def test_the_cheapest_plan_by_what_images_differ_in():
    """Differences with a deviation that falls with the square of the steps, as of midpoints."""
    generator = torch.Generator().manual_seed(0)
    own = 0.01 * torch.randn(1000, generator=generator)
    pixels = torch.arange(1000)[:, None, None, None]

    def bits(chosen, solvers):
        return own[chosen.flatten()][None] * (20 / solvers[4].steps) ** 2

    class Solved:
        resolution, solver = 4, Solver("midpoint", 20)
        flow = type("Flow", (), {"solved": True})

    for tolerance, steps in ((0.1, 4), (0.015, 7), (0.003, 10)):
        made = correction.plan([Solved()], pixels, bits, tolerance)
        assert made.few[4].steps == steps
        assert float(made.differences.std()) / math.sqrt(len(made.chosen)) < 1.5 * tolerance
    assert correction.plan([Solved()], pixels, bits, 1e-4) is None
    assert correction.plan([Solved()], pixels[:20], bits, 0.1) is None


def test_photographs_are_the_units_of_the_correction_too(model):
    many = images(64)
    grouped = Images(many.pixels, "generated", "", torch.arange(64) // 8)
    found = evaluate.evaluate(model, grouped, tolerance=1e-3)
    assert found.error_over == "photographs" and found.corrected["images"] >= correction.PILOT


@pytest.mark.parametrize("tolerance", [-1.0, math.inf, math.nan])
def test_tolerances_out_of_range_are_refused(model, tolerance):
    with pytest.raises(UserError, match=r"evaluate\.tolerance must be above 0"):
        evaluate.evaluate(model, images(), tolerance=tolerance)


def test_solvers_without_steps_are_refused(model):
    with pytest.raises(UserError, match=r"solver\.steps > 0"):
        evaluate.evaluate(solved(model, steps=0, method="bosh3"), images(), tolerance=1e-3)
