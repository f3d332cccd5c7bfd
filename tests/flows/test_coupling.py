"""Couplings: their start from data, their bounds, and what they are not."""

import math

import pytest
import torch
from fields import awake

from mrcnf.errors import UserError
from mrcnf.flows.base import BOUND
from mrcnf.flows.coupling import CouplingFlow
from mrcnf.flows.squeeze import squeeze, unsqueeze


def test_at_first_a_flow_is_an_exact_turn_of_channels():
    flow = CouplingFlow(3, couplings=2, width=4, depth=1)
    y = torch.randn(2, 3, 2, 2)
    found = flow.log_prob(y)
    assert torch.equal(found.latent.sort(1).values, y.sort(1).values)
    normal = -0.5 * (y.square().flatten(1).sum(1) + 12 * math.log(2 * math.pi))
    torch.testing.assert_close(found.log_prob, normal)


@pytest.mark.parametrize("channels, coarse_channels", [(1, 0), (1, 1), (3, 2)])
def test_the_start_standardises_what_comes_to_every_coupling(channels, coarse_channels):
    flow = awake(CouplingFlow(channels, coarse_channels, couplings=3, width=4, depth=1))
    y = 3 * torch.randn(200, channels, 4, 4, dtype=torch.float64) - 5
    coarse = torch.randn(200, coarse_channels, 4, 4, dtype=torch.float64)
    condition = coarse if coarse_channels else None
    flow.initialise(y, condition)
    seen = []
    for coupling in flow:
        coupling.register_forward_pre_hook(
            lambda c, inputs: seen.append((inputs[0] + c.shift) * c.log_scale.exp())
        )
    flow.log_prob(y, condition)
    assert len(seen) == 3
    for z in seen:
        zeros = torch.zeros(z.shape[1], dtype=torch.float64)
        torch.testing.assert_close(z.mean((0, 2, 3)), zeros, rtol=0, atol=1e-10)
        torch.testing.assert_close(z.std((0, 2, 3)), zeros + 1, rtol=1e-10, atol=0)


def test_a_constant_channel_starts_finite():
    flow = CouplingFlow(3, couplings=2, width=4, depth=1)
    y = torch.randn(50, 3, 2, 2)
    y[:, 1] = 7.0
    flow.initialise(y)
    found = flow.log_prob(y)
    assert found.log_prob.isfinite().all() and found.latent.abs().max() < 100


def test_log_scales_are_bounded():
    flow = awake(CouplingFlow(3, couplings=1, width=4, depth=1), size=50.0)
    (coupling,) = flow
    log_scale, shift = coupling.affine(100 * torch.randn(4, 1, 2, 2, dtype=torch.float64), None)
    assert BOUND - 1e-6 < log_scale.abs().max() <= BOUND
    assert shift.abs().max() > 10


def test_the_mixing_keeps_volumes():
    flow = awake(CouplingFlow(6, couplings=2, width=4, depth=1))
    for coupling in flow:
        mixing = coupling._mixing()
        determinant = torch.linalg.det(mixing).abs()
        torch.testing.assert_close(determinant, torch.ones_like(determinant))
        assert (mixing.abs() > 1e-3).sum() > 20


def test_one_channel_is_squeezed_to_four_and_back():
    one = awake(CouplingFlow(1, 1, couplings=2, width=4, depth=1))
    four = CouplingFlow(4, 4, couplings=2, width=4, depth=1).double()
    four.load_state_dict(one.state_dict())
    y, coarse = torch.randn(2, 2, 1, 4, 6, dtype=torch.float64)
    expected = four.log_prob(squeeze(y), squeeze(coarse))
    found = one.log_prob(y, coarse)
    assert torch.equal(found.log_prob, expected.log_prob)
    assert torch.equal(found.latent, unsqueeze(expected.latent))
    assert found.dims == 24


def test_squeezing_puts_the_pixels_of_a_square_one_after_the_other():
    y = torch.randn(2, 3, 4, 6)
    z = squeeze(y)
    for k, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        assert torch.equal(z[:, 3 * k : 3 * k + 3], y[:, :, i::2, j::2])
    assert torch.equal(unsqueeze(z), y)


def test_the_condition_matters_only_where_there_is_one():
    flow = awake(CouplingFlow(2, 1, couplings=2, width=4, depth=1))
    y = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    coarse = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64)
    found = [flow.log_prob(y, part).log_prob for part in coarse]
    assert (found[0] - found[1]).abs().min() > 1e-3


def test_there_is_no_energy_to_regularise_and_one_evaluation():
    flow = CouplingFlow(3, couplings=2, width=4, depth=1)
    found = flow.log_prob(torch.randn(2, 3, 2, 2), regularise=True, end=1.3)
    assert found.kinetic is None and found.frobenius is None and found.penalty is None
    assert found.statistics.evaluations == 1


def test_couplings_have_no_velocity():
    flow = CouplingFlow(3, couplings=1, width=4, depth=1, name="level 8")
    with pytest.raises(UserError, match=r"level 8.*velocity.*train\.objective = likelihood"):
        flow.check_velocity()


def test_hidden_weights_are_those_between_hidden_layers():
    flow = CouplingFlow(3, 2, couplings=2, width=5, depth=1)
    weights = flow.hidden_weights()
    assert len(weights) == 2 * 2 + 2
    own = {id(parameter) for parameter in flow.parameters()}
    assert all(id(w) in own and w.dim() == 4 and w.shape[1] == 5 for w in weights)
