"""The pieces that codecs go along: bridges over the middle of a step, and what is known there."""

import pytest
import torch
from fields import awake

from mrcnf.errors import UserError
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.near_diagonal import Neighbours
from mrcnf.flows.paper_field import PaperField
from mrcnf.flows.residual_field import ResidualField
from mrcnf.flows.solve import Solver
from mrcnf.flows.tangents import Dual
from mrcnf.flows.tiled import Tiled


def case(kind=ResidualField, **options):
    torch.manual_seed(0)
    flow = awake(ContinuousFlow([kind(2, 1, **options)], "flow"))
    y = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    return flow, y, torch.randn(3, 1, 4, 4, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["residual", "paper", "tiles"])
def test_bridges_lead_where_the_flow_does(kind):
    if kind == "paper":
        flow, y, coarse = case(PaperField, hidden=(5, 6))
    else:
        flow, y, coarse = case(width=4, depth=1)
    made = Tiled(flow, 2) if kind == "tiles" else flow
    x, times = y, []
    for bridge in made.pieces(coarse, Solver("midpoint", steps=40)):
        seen = bridge.ahead(x)
        z = x + bridge.rise(seen.y)
        # From behind, the middle is where it is from ahead, but for h³.
        assert (bridge.behind(z).y - seen.y).abs().max() < 1e-2
        x = z
        times.append(bridge.t)
    expected = made.transport(y, coarse, solver=Solver("rk4", steps=40))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-2)
    assert times == sorted(times) and times[0] > 0 and times[-1] < 1


@torch.no_grad()
def test_neighbouring_bridges_share_what_they_compute(monkeypatch):
    flow, y, coarse = case(width=4, depth=1)
    calls = []
    run = ResidualField._parts
    monkeypatch.setattr(ResidualField, "_parts", lambda *a: calls.append(a) or run(*a))
    x = y
    for bridge in flow.pieces(coarse, Solver("euler", steps=5)):
        z = x + bridge.rise(bridge.ahead(x).y)
        bridge.behind(z)
        x = z
    assert len(calls) == 2 * 5 + 1


@torch.no_grad()
def test_a_residual_field_knows_its_gain():
    flow, y, coarse = case(width=4, depth=1)
    (field,) = flow
    t = torch.tensor(0.3, dtype=torch.float64)
    local = field.local(t, y, field.context(coarse))
    assert torch.equal(local.value, field(t, y, coarse)) and local.neighbours is None
    # Linear in y but for what the network makes of it: f - g·y = m·F.
    gain, _, rest, _ = field._parts(t, Dual(y), field.context(coarse))
    assert torch.equal(local.diagonal, gain.value)
    torch.testing.assert_close(y * local.diagonal + rest.value, local.value)


def test_a_head_sees_what_it_is_fitted_to_and_changes_nothing_else():
    flow, y, coarse = case(width=4, depth=1)
    (field,) = flow
    t = torch.full((3,), 0.3, dtype=torch.float64)
    plain = field.local(t, y, field.context(coarse))
    field.near = awake(field.new_near(), 0.2)
    local = field.local(t, y, field.context(coarse))
    assert torch.equal(local.value, plain.value) and local.diagonal.shape == y.shape
    assert not torch.equal(local.diagonal, plain.diagonal)
    assert local.neighbours is not None
    # The matrix of couplings is symmetric.
    a, b = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    left = (a * local.neighbours.apply(b)).sum()
    torch.testing.assert_close(left, (b * local.neighbours.apply(a)).sum())


def test_neighbours_reach_the_next_positions_alone():
    right, below = torch.zeros(1, 1, 1, 3, 3), torch.zeros(1, 1, 1, 3, 3)
    right[..., 1, 0], below[..., 0, 1] = 2.0, 3.0
    one = torch.zeros(1, 1, 3, 3)
    one[..., 1, 1] = 1
    expected = torch.zeros(1, 1, 3, 3)
    expected[..., 1, 0], expected[..., 0, 1] = 2.0, 3.0
    assert torch.equal(Neighbours(right, below).apply(one), expected)


def test_adaptive_steps_have_no_pieces():
    flow, _, coarse = case(width=4, depth=1)
    with pytest.raises(UserError, match="set solver steps > 0"):
        next(flow.pieces(coarse, Solver("dopri5", steps=0)))
