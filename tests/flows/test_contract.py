"""What every flow must keep, and what linear flows and tiny ones are known to be.

A new velocity field is one more line in FLOWS.
"""

import math

import numpy as np
import pytest
import torch
from fields import LinearField, awake, matrix

from mrcnf.errors import UserError
from mrcnf.flows import trace as tracing
from mrcnf.flows.base import Flow
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.paper_field import PaperField
from mrcnf.flows.residual_field import ResidualField
from mrcnf.flows.solve import FIXED, Solver, SolverError
from mrcnf.flows.tiled import Tiled
from mrcnf.flows.trace import Trace

EXACT = Trace("exact")
TIGHT = Solver("dopri5", steps=0, rtol=1e-8, atol=1e-8)
ADAPTIVE = Solver("dopri5", steps=0, rtol=1e-5, atol=1e-5)
STEPS = Solver("midpoint", steps=4)

FLOWS = {
    "linear": lambda: [LinearField(matrix(6), torch.ones(6, dtype=torch.float64))],
    "linear, 2 blocks": lambda: [LinearField(matrix(6, seed)) for seed in (1, 2)],
    "paper": lambda: [PaperField(1, hidden=(5, 6))],
    "paper, 2 blocks": lambda: [PaperField(1, hidden=(5,)) for _ in range(2)],
    "paper, coarse": lambda: [PaperField(1, 2, hidden=(5, 6))],
    "residual": lambda: [ResidualField(1, width=4, depth=1)],
    "residual, coarse": lambda: [ResidualField(1, 2, width=4, depth=2)],
    "tiles, coarse": lambda: [ResidualField(1, 2, width=4, depth=1)],
    "residual, 2 blocks, coarse": lambda: [ResidualField(1, 2, width=4, depth=1) for _ in range(2)],
}
EVERY = pytest.mark.parametrize("name", FLOWS)


def make(name):
    flow = ContinuousFlow(FLOWS[name](), name)
    return Tiled(flow, 1) if name.startswith("tiles") else flow


def case(name, n=2):
    """A flow, its input of 1×2×3 and its coarse image of two channels."""
    torch.manual_seed(0)
    flow = awake(make(name))
    coarse = torch.randn(n, 2, 2, 3, dtype=torch.float64) if "coarse" in name else None
    return flow, torch.randn(n, 1, 2, 3, dtype=torch.float64), coarse


def reference(flow, y, coarse, steps):
    """log p and latent of one image: autograd's Jacobian and a Runge–Kutta loop, nothing else."""
    if isinstance(flow, Tiled):
        tiles = [(i, j) for i in range(y.shape[1]) for j in range(y.shape[2])]
        found = [
            reference(flow.flow, y[:, i : i + 1, j : j + 1], coarse[:, :, [i]][..., [j]], steps)
            for i, j in tiles
        ]
        latents = torch.cat([latent.flatten() for _, latent in found])
        return sum(log_prob for log_prob, _ in found), latents.reshape(y.shape)
    state, total = y.flatten(), 0.0
    grid = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** 2
    for field in flow.fields:

        def rates(t, flat, field=field):
            def f(flat):
                return field(t, flat.reshape(1, *y.shape), coarse).flatten()

            return f(flat).detach(), torch.func.jacrev(f)(flat).trace().item()

        for t, h in zip(grid[:-1], grid.diff(), strict=True):
            k1, d1 = rates(t, state)
            k2, d2 = rates(t + h / 2, state + h / 2 * k1)
            k3, d3 = rates(t + h / 2, state + h / 2 * k2)
            k4, d4 = rates(t + h, state + h * k3)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    normal = -0.5 * (state.square().sum() + y.numel() * math.log(2 * math.pi))
    return normal + total, state.reshape(y.shape)


@EVERY
def test_log_prob_is_the_brute_force_one(name):
    flow, y, coarse = case(name)
    found = flow.log_prob(y, coarse, solver=Solver("rk4", steps=6), trace=EXACT)
    log_prob, latent = reference(flow, y[1], None if coarse is None else coarse[1:], steps=6)
    torch.testing.assert_close(found.log_prob[1], log_prob, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.latent[1], latent, rtol=0, atol=1e-10)


@EVERY
def test_log_prob_is_the_change_of_variables(name):
    flow, y, coarse = case(name, n=1)
    dims = y.numel()
    # One copy of the image for each row of the Jacobian: one backward pass gives them all.
    copies = y.expand(dims, -1, -1, -1).clone().requires_grad_()
    conditions = None if coarse is None else coarse.expand(dims, -1, -1, -1)
    latent = flow.transport(copies, conditions, solver=ADAPTIVE)
    identity = torch.eye(dims, dtype=torch.float64).reshape(latent.shape)
    (jacobian,) = torch.autograd.grad(latent, copies, identity)
    normal = -0.5 * (latent[0].square().sum() + dims * math.log(2 * math.pi))
    volume = torch.linalg.slogdet(jacobian.flatten(1)).logabsdet
    found = flow.log_prob(y, coarse, solver=ADAPTIVE, trace=EXACT).log_prob[0]
    assert volume.abs() > 2e-2
    assert (found - normal - volume).abs() < 1e-3


@EVERY
def test_transport_backwards_undoes_transport(name):
    flow, y, coarse = case(name)
    with torch.no_grad():
        latent = flow.transport(y, coarse, solver=TIGHT)
        back = flow.transport(latent, coarse, backwards=True, solver=TIGHT)
    assert (latent - y).abs().max() > 1e-2
    torch.testing.assert_close(back, y, rtol=0, atol=1e-3)


@EVERY
def test_transport_and_log_prob_reach_the_same_latent(name):
    flow, y, coarse = case(name)
    latent = flow.transport(y, coarse, solver=STEPS)
    found = flow.log_prob(y, coarse, solver=STEPS, trace=EXACT).latent
    torch.testing.assert_close(latent, found, rtol=0, atol=1e-12)


@EVERY
def test_gradients_of_input_and_parameters(name):
    flow, y, coarse = case(name)
    inputs = [y, *([] if coarse is None else [coarse])]
    for tensor in inputs:
        tensor.requires_grad_()
    tensors = [*inputs, *flow.parameters()]
    probes = torch.Generator()

    def loss():
        result = flow.log_prob(
            y, coarse, solver=STEPS, trace=Trace(probes=2), generator=probes.manual_seed(1)
        )
        return result.log_prob.sum()

    gradients = torch.autograd.grad(loss(), tensors)
    directions = [torch.randn_like(tensor) for tensor in tensors]
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor += step * direction
            ends.append(loss().item())
    along = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    assert along == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
    assert all(g.abs().max() > 0 for g in gradients)


@EVERY
def test_each_image_has_its_own_density(name):
    flow, y, coarse = case(name, n=3)
    together = flow.log_prob(y, coarse, solver=STEPS, trace=EXACT).log_prob
    for i in range(3):
        part = None if coarse is None else coarse[i : i + 1]
        alone = flow.log_prob(y[i : i + 1], part, solver=STEPS, trace=EXACT).log_prob
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-12, atol=1e-12)


@EVERY
def test_single_precision_is_kept_and_close(name):
    flow, y, coarse = case(name)
    double = flow.log_prob(y, coarse, solver=STEPS, trace=EXACT, regularise=True)
    single = flow.float().log_prob(
        y.float(),
        None if coarse is None else coarse.float(),
        solver=STEPS,
        trace=EXACT,
        regularise=True,
    )
    for key in ("log_prob", "latent", "kinetic", "frobenius"):
        value = getattr(single, key)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), getattr(double, key), rtol=1e-4, atol=1e-4)


@EVERY
def test_memory_layout_does_not_matter(name):
    flow, y, coarse = case(name)
    expected = flow.log_prob(y, coarse, solver=STEPS, trace=EXACT).log_prob
    transposed = y.mT.contiguous().mT
    assert not transposed.is_contiguous()
    found = flow.log_prob(transposed, coarse, solver=STEPS, trace=EXACT).log_prob
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@EVERY
def test_saved_weights_give_the_same_densities(name, tmp_path):
    flow, y, coarse = case(name)
    torch.save(flow.state_dict(), tmp_path / "flow.pt")
    again = make(name).double()
    again.load_state_dict(torch.load(tmp_path / "flow.pt", weights_only=True))
    before, after = (f.log_prob(y, coarse, solver=STEPS, trace=EXACT) for f in (flow, again))
    assert torch.equal(before.log_prob, after.log_prob)


@EVERY
@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_estimated_log_probs_average_to_the_exact_one(method, name):
    flow, y, coarse = case(name, n=1)
    rows = 200
    many = y.expand(rows, -1, -1, -1)
    conditions = None if coarse is None else coarse.expand(rows, -1, -1, -1)
    with torch.no_grad():
        exact = flow.log_prob(y, coarse, solver=STEPS, trace=EXACT).log_prob
        found = flow.log_prob(many, conditions, solver=STEPS, trace=Trace(method, 1)).log_prob
    # A tile of one number needs no estimate.
    assert (found.mean() - exact).abs() < 4 * found.std() / math.sqrt(rows) + 1e-12


# -- short steps -------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("method", FIXED)
def test_steps_are_the_same_map(name, method):
    flow, y, coarse = case(name)
    solver = Solver(method, steps=5)
    z = y
    for step in flow.steps(coarse, solver):
        z = step.forward(z)
    with torch.no_grad():
        expected = flow.transport(y, coarse, solver=solver)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)


@EVERY
@pytest.mark.parametrize("tolerance", [1e-4, 1e-12])
def test_steps_are_undone_to_the_accuracy_asked_for(name, tolerance):
    flow, y, coarse = case(name)
    for step in flow.steps(coarse, Solver("midpoint", steps=12), tolerance=tolerance):
        z = step.forward(y)
        back = step.backward(z)
        assert (step.forward(back) - z).abs().max() <= tolerance
        # Off by no more than that, times what the inverse stretches it by.
        assert (back - y).abs().max() <= 20 * tolerance
        assert (z - y).abs().max() > 1e-4
        y = z


@EVERY
def test_the_scale_of_a_step_is_the_diagonal_of_its_jacobian(name):
    flow, y, coarse = case(name)
    condition = None if coarse is None else coarse[:1]
    for step in flow.steps(condition, Solver("bosh3", steps=3), trace=EXACT):
        # Differences: steps are not differentiable, nor need to be.
        h = 1e-5
        basis = h * torch.eye(6, dtype=torch.float64).reshape(6, 1, 1, 2, 3)
        rise = [step.forward(y[:1] + e) - step.forward(y[:1] - e) for e in basis]
        diagonal = (torch.stack(rise) * basis).sum(0) / (2 * h * h)
        torch.testing.assert_close(step.log_scale(y[:1]).exp(), diagonal, rtol=0, atol=1e-8)
        assert (diagonal - 1).abs().max() > 1e-3


def test_estimated_scales_average_to_the_diagonal_and_repeat():
    flow, y, coarse = case("residual, coarse")
    many = {"trace": Trace("hutchinson", 4000), "seed": 7}
    exact = next(flow.steps(coarse, STEPS, trace=EXACT)).log_scale(y)
    step = next(flow.steps(coarse, STEPS, **many))
    torch.testing.assert_close(step.log_scale(y), exact, rtol=0, atol=0.05)
    again = next(flow.steps(coarse, STEPS, **many)).log_scale(y)
    assert torch.equal(step.log_scale(y), again)
    few = [next(flow.steps(coarse, STEPS, seed=s)).log_scale(y) for s in (1, 2)]
    assert not torch.equal(*few)


@EVERY
def test_what_a_step_makes_of_an_image_does_not_depend_on_those_beside_it(name):
    """A codec may decode in other batches than it encoded in."""
    flow, y, coarse = case(name, n=3)
    y[0] *= 3  # takes more sweeps than the others
    alone = flow.steps(None if coarse is None else coarse[1:2], Solver("midpoint", steps=12))
    for step, single in zip(flow.steps(coarse, Solver("midpoint", steps=12)), alone, strict=True):
        for of_batch, of_image in ((step.backward, single.backward),
                                   (step.log_scale, single.log_scale)):  # fmt: skip
            torch.testing.assert_close(of_batch(y)[1:2], of_image(y[1:2]), rtol=0, atol=1e-13)


@EVERY
def test_steps_work_in_single_precision(name):
    flow, y, coarse = case(name)
    flow, y = flow.float(), y.float()
    coarse = None if coarse is None else coarse.float()
    for step in flow.steps(coarse, Solver("midpoint", steps=12), tolerance=1e-5):
        z = step.forward(y)
        torch.testing.assert_close(step.backward(z), y, rtol=0, atol=2e-4)
        y = z


def test_steps_that_cannot_be_had_are_refused():
    flow, y, coarse = case("paper")
    with pytest.raises(UserError, match="set solver steps > 0"):
        next(flow.steps(coarse, TIGHT))
    with pytest.raises(UserError, match="hutch"):
        next(flow.steps(coarse, STEPS, trace=Trace("hutch++"))).log_scale(y)
    step = next(flow.steps(coarse, Solver("euler", steps=1), tolerance=1e-30))
    with pytest.raises(SolverError, match=r"in 50 sweeps.*Take more steps, or a tolerance"):
        step.backward(y)


# -- velocity ----------------------------------------------------------------------------------


def test_a_flow_of_one_field_has_its_velocity():
    flow, y, coarse = case("residual, coarse")
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    assert torch.equal(flow.velocity(t, y, coarse), flow.fields[0](t, y, coarse))


class Shift(Flow):
    """y + 1: a flow without a velocity."""

    name = "level 4"

    def log_prob(self, y, condition=None, **how):
        raise AssertionError

    transport = steps = compile = hidden_weights = log_prob


def test_asking_for_a_velocity_that_is_not_there_is_one_clear_line():
    y, t = torch.zeros(2, 1, 2, 3), torch.zeros(2)
    with pytest.raises(UserError, match=r"level 4.*Shift.*train.objective = likelihood"):
        Shift().velocity(t, y)
    flow, *_ = case("paper, 2 blocks")
    with pytest.raises(UserError, match=r"one field.*has 2.*field.blocks = 1"):
        flow.velocity(t, y)


# -- linear flows -----------------------------------------------------------------------------

SOLVERS = {
    "euler": (Solver("euler", steps=400), 5e-2),
    "midpoint": (Solver("midpoint", steps=60), 1e-2),
    "heun": (Solver("heun", steps=60), 1e-2),
    "bosh3, fixed": (Solver("bosh3", steps=40), 1e-4),
    "rk4": (Solver("rk4", steps=30), 1e-5),
    "checkpoint": (Solver("rk4", steps=30, gradient="checkpoint"), 1e-5),
    "dopri5": (TIGHT, 1e-6),
    "dopri8": (Solver("dopri8", steps=0, rtol=1e-8, atol=1e-8), 1e-6),
    "bosh3": (Solver("bosh3", steps=0, rtol=1e-7, atol=1e-7), 1e-5),
    "adaptive_heun": (Solver("adaptive_heun", steps=0), 1e-3),
    "adjoint": (Solver("dopri5", steps=0, rtol=1e-8, atol=1e-8, gradient="adjoint"), 1e-6),
}


@pytest.mark.parametrize("kind", tracing.PROBES)
@pytest.mark.parametrize("method", tracing.METHODS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_linear_flow_has_its_closed_form(name, method, kind):
    solver, tolerance = SOLVERS[name]
    a, y = matrix(6), torch.randn(3, 1, 2, 3, dtype=torch.float64)
    flow = ContinuousFlow([LinearField(a)])
    generator = torch.Generator().manual_seed(2)
    found = flow.log_prob(
        y, solver=solver, trace=Trace(method, 6, kind), generator=generator, regularise=True
    )
    latent = y.flatten(1) @ torch.matrix_exp(a).T
    trace = a.trace()
    if method == "hutchinson":  # a constant Jacobian: the estimate is known, given the probes
        probes = tracing.draw_probes(y, 6, kind=kind, generator=generator.manual_seed(2))
        flat = probes.flatten(2)
        trace = ((flat @ a.T) * flat).sum(2).mean(0)
    expected = -0.5 * (latent.square().sum(1) + 6 * math.log(2 * math.pi)) + trace
    torch.testing.assert_close(found.log_prob, expected.detach(), rtol=0, atol=6 * tolerance)
    assert found.statistics.evaluations > 0


def test_kinetic_energy_and_frobenius_norm_of_a_linear_flow():
    a, y = matrix(6), torch.randn(3, 1, 2, 3, dtype=torch.float64)
    flow = ContinuousFlow([LinearField(a)])
    found = flow.log_prob(y, solver=TIGHT, trace=EXACT, regularise=True)
    # ∫ ‖A exp(tA) y‖²/D dt by Gauss–Legendre, exact far beyond the tolerance.
    nodes, weights = np.polynomial.legendre.leggauss(20)
    energy = sum(
        w / 2 * (y.flatten(1) @ (a @ torch.matrix_exp((x + 1) / 2 * a)).T).square().mean(1)
        for x, w in zip(nodes.tolist(), weights.tolist(), strict=True)
    )
    torch.testing.assert_close(found.kinetic, energy, rtol=0, atol=1e-6)
    norm = (a.square().sum() / 6).expand(3)
    torch.testing.assert_close(found.frobenius, norm, rtol=0, atol=1e-6)


def test_blocks_add_their_regularisers():
    a, b = matrix(6, 1), matrix(6, 2)
    y = torch.randn(3, 1, 2, 3, dtype=torch.float64)
    both = ContinuousFlow([LinearField(a), LinearField(b)])
    found = both.log_prob(y, solver=TIGHT, trace=EXACT, regularise=True)
    norm = ((a.square().sum() + b.square().sum()) / 6).expand(3)
    torch.testing.assert_close(found.frobenius, norm, rtol=0, atol=1e-6)
    separate = [ContinuousFlow([LinearField(m)]) for m in (a, b)]
    first = separate[0].log_prob(y, solver=TIGHT, trace=EXACT, regularise=True)
    second = separate[1].log_prob(first.latent, solver=TIGHT, trace=EXACT, regularise=True)
    torch.testing.assert_close(found.kinetic, first.kinetic + second.kinetic, rtol=0, atol=1e-6)


def test_the_end_is_the_end_of_the_path():
    a, y = matrix(6), torch.randn(3, 1, 2, 3, dtype=torch.float64)
    flow = ContinuousFlow([LinearField(a)])
    found = flow.log_prob(y, solver=TIGHT, trace=EXACT, end=1.1)
    latent = y.flatten(1) @ torch.matrix_exp(1.1 * a).T
    expected = -0.5 * (latent.square().sum(1) + 6 * math.log(2 * math.pi)) + 1.1 * a.trace()
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-5)


# -- densities --------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [PaperField, ResidualField])
@pytest.mark.parametrize("dims", [1, 2])
def test_densities_integrate_to_one(dims, field):
    small = {"hidden": (4,)} if field is PaperField else {"width": 3, "depth": 1}
    flow = awake(ContinuousFlow([field(1, **small)]), size=0.2)
    side = torch.linspace(-9, 9, 181 if dims == 1 else 61, dtype=torch.float64)
    points = torch.cartesian_prod(*[side] * dims).reshape(-1, 1, 1, dims)
    with torch.no_grad():
        found = flow.log_prob(points, solver=Solver("midpoint", steps=16), trace=EXACT)
    mass = found.log_prob.exp().sum() * (side[1] - side[0]) ** dims
    assert mass.item() == pytest.approx(1, abs=5e-3)
    # Not merely the normal it would be at rest.
    assert (found.latent - points).abs().max() > 0.1


@pytest.mark.parametrize("wrong", [{"method": "approximate"}, {"probes": 0}, {"kind": "uniform"}])
def test_wrong_trace_settings_are_refused(wrong):
    with pytest.raises(UserError, match="trace"):
        Trace(**wrong)
