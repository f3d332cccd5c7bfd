"""The reference path: the published algorithm gives what ours gives, by another road."""

import pytest
import torch
from fields import awake

from mrcnf.flows.paper_field import PaperField
from mrcnf.flows.solve import Solver
from mrcnf.flows.tangents import Dual
from mrcnf.flows.trace import Trace
from mrcnf.image.noise import dequantise
from mrcnf.measure import reference
from mrcnf.model.level import Level
from mrcnf.model.settings import FieldConfig, ModelConfig
from mrcnf.training import objectives

GAUSSIAN = Trace(kind="gaussian")
FINE = Solver("rk4", 24, 1.0)
TIGHT = Solver("dopri5", 0, rtol=1e-9, atol=1e-9)
TIGHT_ADJOINT = Solver("dopri5", 0, rtol=1e-9, atol=1e-9, gradient="adjoint")


def level(resolution: int) -> Level:
    config = ModelConfig(resolutions=(4, 8), channels=2, base="logit")
    found = Level(config, resolution, FieldConfig("paper", 6, 1, 2))
    awake(found.flow, 0.2)
    return found.double()


def images(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    integers = torch.randint(0, 256, (n, 2, 8, 8), dtype=torch.uint8)
    return dequantise(integers, dtype=torch.float64)


def gradient(found: Level, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(found.parameters()))])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("coarse_channels", [0, 2])
@pytest.mark.parametrize("t", [0.0, 0.37, 1.0])
def test_a_concatenated_channel_equals_the_time_map(coarse_channels, t):
    field = awake(PaperField(3, coarse_channels, (7, 5)))
    y = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    coarse = torch.randn(4, coarse_channels, 5, 6, dtype=torch.float64) if coarse_channels else None
    time = torch.tensor(t, dtype=torch.float64)
    concatenated = reference.ConcatenatedField(field)
    torch.testing.assert_close(concatenated(time, y, coarse), field(time, y, coarse))


def test_it_shares_the_weights():
    field = PaperField(3)
    shared = reference.ConcatenatedField(field)
    assert all(a is b for a, b in zip(shared.parameters(), field.parameters(), strict=True))


@pytest.mark.parametrize("resolution", [4, 8])
def test_densities_agree_for_the_same_probe(resolution):
    found, (x, _) = level(resolution), images()
    with torch.no_grad():
        theirs = reference.log_prob(found, x, solver=TIGHT, regularise=True, generator=seeded())
        ours = found.log_prob(x, solver=TIGHT, trace=GAUSSIAN, regularise=True, generator=seeded())
    torch.testing.assert_close(theirs.log_prob, ours.log_prob, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(theirs.latent, ours.latent, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(theirs.kinetic, ours.kinetic, rtol=1e-6, atol=1e-7)
    # The norms are two estimates of one number, ‖Jᵀe‖² and ‖J e‖²: alike, not equal.
    assert theirs.frobenius.shape == ours.frobenius.shape


@pytest.mark.parametrize("resolution", [4, 8])
def test_gradients_agree_for_the_same_probe(resolution):
    """Published adjoint against ours through 24 steps of rk4: to 1e-5 of the gradient's norm."""
    found, (x, log_q) = level(resolution), images()
    weights = {"kinetic": 0.01, "frobenius": 0.0, "generator": seeded()}
    theirs, _ = reference.training_step(found, x, log_q, solver=TIGHT_ADJOINT, **weights)
    weights["generator"] = seeded()
    ours, _ = objectives.likelihood(found, x, log_q, solver=FINE, trace=GAUSSIAN, **weights)
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-7)
    expected = gradient(found, ours)
    assert (gradient(found, theirs) - expected).norm() < 1e-5 * expected.norm()


def test_the_frobenius_norm_is_estimated_without_bias():
    """Averaged over many probes ‖Jᵀe‖² and ‖J e‖² agree within their errors."""
    found, (x, _) = level(4), images(1)
    many = x.expand(600, -1, -1, -1)
    with torch.no_grad():
        solver = Solver("rk4", 3, 1.0)
        theirs = reference.log_prob(
            found, many, solver=solver, regularise=True, generator=seeded()
        ).frobenius
        ours = found.log_prob(
            many, solver=solver, trace=GAUSSIAN, regularise=True, generator=seeded()
        ).frobenius
    error = ((theirs.var() + ours.var()) / len(many)).sqrt()
    assert 0 < error < 0.05 * ours.mean()
    assert (theirs.mean() - ours.mean()).abs() < 4 * error


@pytest.mark.parametrize("density", [False, True])
def test_samples_are_those_of_our_solve(density):
    found, (x, _) = level(8), images()
    latent = torch.randn(3, *found.latent_shape(8, 8), dtype=torch.float64)
    _, coarse = found.coefficients(x)
    theirs, cost = reference.sample(found, latent, coarse, solver=TIGHT, density=density)
    with torch.no_grad():
        expected = found.generate(latent, coarse, TIGHT)
    torch.testing.assert_close(theirs, expected, rtol=1e-7, atol=1e-7)
    assert cost.evaluations > 0


def test_published_settings():
    for solver, tolerance in ((reference.TRAINING, 1e-3), (reference.EVALUATION, 1e-5)):
        assert (solver.method, solver.steps, solver.first_step) == ("bosh3", 0, 1 / 6)
        assert solver.rtol == solver.atol == tolerance
    assert reference.TRAINING.gradient == "adjoint"


def test_other_fields_and_forward_mode_are_refused():
    config = ModelConfig(resolutions=(4, 8), channels=1)
    other = Level(config, 4, FieldConfig("residual", 4, 1))
    with pytest.raises(reference.UserError, match="paper"):
        reference.log_prob(other, torch.rand(1, 1, 8, 8))
    field, y = reference.ConcatenatedField(PaperField(1)), torch.zeros(1, 1, 4, 4)
    with pytest.raises(reference.UserError, match="reverse mode"):
        field.run(torch.tensor(0.5), Dual(y, y[None]), None)
