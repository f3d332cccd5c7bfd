"""What every flow must keep, and what linear flows and tiny ones are known to be.

A new velocity field is one more line in FLOWS.
"""

import functools
import math

import numpy as np
import pytest
import torch
from fields import LinearField, awake, matrix
from scipy.integrate import solve_ivp

from mrcnf import trace as tracing
from mrcnf.errors import UserError
from mrcnf.flow import ContinuousFlow, Trace
from mrcnf.solve import Solver
from mrcnf.velocity import PaperField, ResidualField

EXACT = Trace("exact")
TIGHT = Solver("dopri5", steps=0, rtol=1e-8, atol=1e-8)
STEPS = Solver("midpoint", steps=4)

FLOWS = {
    "linear": lambda: [LinearField(matrix(6), torch.ones(6, dtype=torch.float64))],
    "linear, 2 blocks": lambda: [LinearField(matrix(6, seed)) for seed in (1, 2)],
    "paper": lambda: [PaperField(1, hidden=(5, 6))],
    "paper, 2 blocks": lambda: [PaperField(1, hidden=(5,)) for _ in range(2)],
    "paper, coarse": lambda: [PaperField(1, 2, hidden=(5, 6))],
    "residual": lambda: [ResidualField(1, width=4, depth=1)],
    "residual, coarse": lambda: [ResidualField(1, 2, width=4, depth=2)],
    "residual, 2 blocks, coarse": lambda: [ResidualField(1, 2, width=4, depth=1) for _ in range(2)],
}
EVERY = pytest.mark.parametrize("name", FLOWS)


def case(name, n=2):
    """A flow, its input of 1×2×3 and its coarse image of two channels."""
    torch.manual_seed(0)
    flow = awake(ContinuousFlow(FLOWS[name](), name))
    coarse = torch.randn(n, 2, 2, 3, dtype=torch.float64) if "coarse" in name else None
    return flow, torch.randn(n, 1, 2, 3, dtype=torch.float64), coarse


@functools.cache
def tight(name):
    flow, y, coarse = case(name)
    with torch.no_grad():
        return flow.log_prob(y, coarse, solver=TIGHT, trace=EXACT)


def reference(flow, y, coarse):
    """log p and latent of one image, with autograd's Jacobian and SciPy's solver alone."""
    dims, total, state = y.numel(), 0.0, y.flatten().numpy()
    for field in flow.fields:

        def rate(t, state, field=field):
            def f(flat):
                time = torch.tensor(t, dtype=torch.float64)
                return field(time, flat.reshape(1, *y.shape), coarse).flatten()

            at = torch.from_numpy(state[:-1].copy())
            jacobian = torch.func.jacrev(f)(at)
            return np.append(f(at).detach().numpy(), jacobian.trace().item())

        ends = solve_ivp(rate, (0, 1), np.append(state, 0.0), method="DOP853", rtol=1e-8, atol=1e-8)
        state, total = ends.y[:-1, -1], total + ends.y[-1, -1]
    normal = -0.5 * (state @ state + dims * math.log(2 * math.pi))
    return normal + total, torch.from_numpy(state).reshape(y.shape)


@EVERY
def test_log_prob_is_the_brute_force_one(name):
    flow, y, coarse = case(name)
    found = tight(name)
    log_prob, latent = reference(flow, y[1], None if coarse is None else coarse[1:])
    assert found.log_prob[1].item() == pytest.approx(log_prob, abs=1e-5)
    torch.testing.assert_close(found.latent[1], latent, rtol=0, atol=1e-5)


@EVERY
def test_log_prob_is_the_change_of_variables(name):
    flow, y, coarse = case(name, n=1)
    solver = Solver("dopri8", steps=0, rtol=1e-7, atol=1e-7)

    def push(y):
        return flow.transport(y, coarse, solver=solver)

    jacobian = torch.autograd.functional.jacobian(push, y).reshape(y.numel(), y.numel())
    normal = -0.5 * (push(y).square().sum() + y.numel() * math.log(2 * math.pi))
    expected = normal + torch.linalg.slogdet(jacobian).logabsdet
    found = flow.log_prob(y, coarse, solver=solver, trace=EXACT).log_prob[0]
    assert (found - expected).abs() < 2e-5


@EVERY
def test_transport_backwards_undoes_transport(name):
    flow, y, coarse = case(name)
    with torch.no_grad():
        latent = flow.transport(y, coarse, solver=TIGHT)
        back = flow.transport(latent, coarse, backwards=True, solver=TIGHT)
    assert (latent - y).abs().max() > 1e-2
    torch.testing.assert_close(latent, tight(name).latent, rtol=0, atol=1e-6)
    torch.testing.assert_close(back, y, rtol=0, atol=1e-5)


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
    again = ContinuousFlow(FLOWS[name](), name).double()
    again.load_state_dict(torch.load(tmp_path / "flow.pt", weights_only=True))
    before, after = (f.log_prob(y, coarse, solver=STEPS, trace=EXACT) for f in (flow, again))
    assert torch.equal(before.log_prob, after.log_prob)


@EVERY
@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_estimated_log_probs_average_to_the_exact_one(method, name):
    flow, y, coarse = case(name, n=1)
    rows = 600
    many = y.expand(rows, -1, -1, -1)
    conditions = None if coarse is None else coarse.expand(rows, -1, -1, -1)
    with torch.no_grad():
        exact = flow.log_prob(y, coarse, solver=STEPS, trace=EXACT).log_prob
        found = flow.log_prob(many, conditions, solver=STEPS, trace=Trace(method, 1)).log_prob
    assert (found.mean() - exact).abs() < 4 * found.std() / math.sqrt(rows)


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
    "fehlberg2": (Solver("fehlberg2", steps=0, rtol=1e-7, atol=1e-7), 1e-3),
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


def test_start_and_end_are_the_ends_of_the_path():
    a, y = matrix(6), torch.randn(3, 1, 2, 3, dtype=torch.float64)
    flow = ContinuousFlow([LinearField(a)])
    found = flow.log_prob(y, solver=TIGHT, trace=EXACT, start=0.2, end=1.1)
    latent = y.flatten(1) @ torch.matrix_exp(0.9 * a).T
    expected = -0.5 * (latent.square().sum(1) + 6 * math.log(2 * math.pi)) + 0.9 * a.trace()
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-5)
    back = flow.transport(
        flow.transport(y, start=0.2, solver=TIGHT), start=0.2, solver=TIGHT, backwards=True
    )
    torch.testing.assert_close(back, y, rtol=0, atol=1e-6)


# -- densities --------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [PaperField, ResidualField])
@pytest.mark.parametrize("dims", [1, 2])
def test_densities_integrate_to_one(dims, field):
    small = {"hidden": (4,)} if field is PaperField else {"width": 3, "depth": 1}
    flow = awake(ContinuousFlow([field(1, **small)]), size=0.3)
    side = torch.linspace(-9, 9, 181 if dims == 1 else 91, dtype=torch.float64)
    points = torch.cartesian_prod(*[side] * dims).reshape(-1, 1, 1, dims)
    with torch.no_grad():
        found = flow.log_prob(points, solver=Solver("rk4", steps=16), trace=EXACT)
    mass = found.log_prob.exp().sum() * (side[1] - side[0]) ** dims
    assert mass.item() == pytest.approx(1, abs=2e-3)
    # Not merely the normal it would be at rest.
    assert (found.latent - points).abs().max() > 0.1


@pytest.mark.parametrize(
    "wrong", [{"method": "approximate"}, {"probes": 0}, {"kind": "uniform"}]
)
def test_wrong_trace_settings_are_refused(wrong):
    with pytest.raises(UserError, match="trace"):
        Trace(**wrong)
