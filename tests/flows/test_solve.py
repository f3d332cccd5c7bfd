"""Solvers against closed forms: accuracy, order, direction, cost, failure and gradients."""

import functools
import math
import time

import pytest
import torch
from fields import awake, matrix

from mrcnf.errors import UserError
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.fields import FIELDS, build
from mrcnf.flows.solve import ADAPTIVE, FIXED, Solver, SolverError, solve, time_grid
from mrcnf.flows.trace import Trace
from mrcnf.flows.velocity import Field

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "bosh3": 3, "rk4": 4}
STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "bosh3": 3, "rk4": 4}


def adaptive(method="dopri5", tolerance=1e-8, **more):
    return Solver(method, steps=0, rtol=tolerance, atol=tolerance, **more)


def linear(a):
    return lambda t, state: (state[0] @ a.T,)


def wave(t, state):
    """dy/dt = cos(5t)·y: depends on time; y(t) = y(0)·exp(sin(5t)/5)."""
    return (torch.cos(5 * t) * state[0],)


def start(n=3, d=4):
    return torch.randn(n, d, dtype=torch.float64)


# -- accuracy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (0.3, 0.9)])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_solves_a_linear_field(method, ends):
    a, y = matrix(4), start()
    tolerance = 1e-6 if method == "adaptive_heun" else 1e-9
    (found,), _ = solve(linear(a), (y,), adaptive(method, tolerance), *ends)
    exact = y @ torch.matrix_exp((ends[1] - ends[0]) * a).T
    # The tolerance is one step's; errors add up over steps.
    allowed = 20 * tolerance
    torch.testing.assert_close(found, exact, rtol=0, atol=allowed)


@pytest.mark.parametrize("spacing", [1.0, 2.0])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_converge_at_their_order(method, ends, spacing):
    y = start()
    growth = (math.sin(5 * ends[1]) - math.sin(5 * ends[0])) / 5
    errors = []
    for steps in (128, 256):
        (found,), _ = solve(wave, (y,), Solver(method, steps=steps, spacing=spacing), *ends)
        errors.append((found - y * math.exp(growth)).norm())
    assert errors[1] > 1e-12  # or rounding would be what is measured
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[method], abs=0.15)


def test_every_part_of_the_state_is_carried():
    y = start()

    def dynamics(t, state):
        return state[1], -state[0], state[0].sum(1)

    parts, _ = solve(dynamics, (y, torch.zeros_like(y), y.new_zeros(3)), adaptive())
    torch.testing.assert_close(parts[0], y * math.cos(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(parts[1], -y * math.sin(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(parts[2], y.sum(1) * math.sin(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [Solver(steps=3), adaptive(tolerance=1e-4)])
def test_time_and_state_keep_their_type(solver, dtype):
    seen = set()

    def dynamics(t, state):
        seen.add((t.dtype, t.dim()))
        return (t * state[0],)

    (found,), _ = solve(dynamics, (start().to(dtype),), solver)
    assert found.dtype == dtype and seen == {(dtype, 0)}


# -- steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [1.0, 2.0, 3.0])
def test_the_grid_is_finer_near_its_lower_end(spacing):
    points = time_grid(Solver(steps=4, spacing=spacing), 0.2, 1.0)
    expected = [0.2 + 0.8 * (i / 4) ** spacing for i in range(5)]
    torch.testing.assert_close(points, torch.tensor(expected, dtype=torch.float64))


def test_backwards_steps_are_the_forward_ones_reversed():
    solver = Solver(steps=7)
    assert torch.equal(time_grid(solver, 1.0, 0.1), time_grid(solver, 0.1, 1.0).flip(0))


@pytest.mark.parametrize("method", FIXED)
def test_the_velocity_is_evaluated_as_often_as_reported(method):
    calls = []

    def dynamics(t, state):
        calls.append(float(t))
        return (state[0],)

    _, statistics = solve(dynamics, (start(),), Solver(method, steps=5))
    assert statistics.evaluations == len(calls) == 5 * STAGES[method]
    assert statistics.accepted == 5 and statistics.rejected == 0
    assert min(calls) >= 0 and max(calls) <= 1


@pytest.mark.parametrize("rate", [1e-4, 1.0, 50.0])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.9, 0.25)])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_steps_stay_between_the_ends(method, ends, rate):
    # A slow field tempts the choice of the first step far outside.
    calls = []

    def dynamics(t, state):
        calls.append(float(t))
        return (-rate * state[0],)

    tolerance = 1e-3 if rate > 1 else 1e-5
    (found,), statistics = solve(dynamics, (start(),), adaptive(method, tolerance), *ends)
    assert min(calls) >= min(ends) and max(calls) <= max(ends)
    assert statistics.evaluations == len(calls) and statistics.accepted > 0
    assert found.isfinite().all()


def test_stiffness_is_rejected_steps():
    def kink(t, state):
        return (-300 * torch.exp(-(((t - 0.5) / 0.1) ** 2)) * state[0],)

    _, statistics = solve(kink, (start(),), adaptive(tolerance=1e-6))
    assert statistics.accepted > 0 and statistics.rejected > 0
    _, easy = solve(lambda t, state: (-state[0],), (start(),), adaptive(tolerance=1e-6))
    assert easy.rejected == 0 and easy.evaluations < statistics.evaluations


def test_first_step_is_the_one_asked_for():
    calls = []

    def dynamics(t, state):
        calls.append(float(t))
        return (state[0],)

    solve(dynamics, (start(),), adaptive("adaptive_heun", 1e-3, first_step=0.01))
    assert calls[:2] == [0.0, pytest.approx(0.01)]


def test_finer_is_finer():
    assert Solver("rk4", steps=10).finer() == Solver("rk4", steps=20)
    finer = adaptive(tolerance=1e-4).finer()
    assert finer.steps == 0 and finer.rtol == pytest.approx(1e-5) == finer.atol


# -- failure ----------------------------------------------------------------------------------


def blow_up(t, state):
    return (state[0] ** 2,)


def not_a_number_late(t, state):
    return (state[0] * (float("nan") if t > 0.5 else 1.0),)


@pytest.mark.parametrize("dynamics", [blow_up, not_a_number_late])
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8"])
def test_a_failure_says_where_and_what_to_try(method, dynamics):
    y = torch.full((2, 3), 2.0, dtype=torch.float64)  # y² blows up at t = 1/2
    began = time.perf_counter()
    with pytest.raises(SolverError) as caught:
        solve(dynamics, (y,), adaptive(method, 1e-5), label="level 16")
    assert time.perf_counter() - began < 10
    error, message = caught.value, str(caught.value)
    assert error.label == "level 16" and message.startswith("level 16: ")
    assert 0 < error.t <= 0.51 and 0 < error.evaluations <= 5000
    assert f"{error.evaluations} evaluations" in message and "last step" in message
    assert f"t = {error.t:.4g}" in message
    for advice in ("rtol", "max_evaluations", "fixed steps", "regularisation"):
        assert advice in message


def test_a_failure_on_the_way_back_is_located():
    with pytest.raises(SolverError) as caught:
        solve(blow_up, (torch.full((2,), -2.0),), adaptive(tolerance=1e-4), 1.0, 0.0)
    assert caught.value.t == pytest.approx(0.5, abs=0.02)


def test_evaluations_are_limited():
    calls = []

    def dynamics(t, state):
        calls.append(t)
        return (-1e4 * state[0] + torch.cos(1e4 * t),)

    with pytest.raises(SolverError, match="too many evaluations") as caught:
        solve(dynamics, (start(),), adaptive(max_evaluations=100))
    assert len(calls) == 100 and 0 < caught.value.t < 1 and caught.value.step > 0


def test_fixed_steps_report_a_non_finite_state():
    def explosion(t, state):
        return (state[0] ** 4 * 1e30,)

    with pytest.raises(SolverError, match=r"level 8: non-finite state at t = 1 .*20 evaluations"):
        solve(explosion, (start(),), Solver(steps=10), label="level 8")
    (found,), _ = solve(explosion, (start(),), Solver(steps=10), check=False)
    assert not found.isfinite().all()


def test_the_adjoint_reports_its_own_failures():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def edge(t, state):  # its value is 0 and its slope is infinite
        return (weight * (state[0] - 1).abs().sqrt(),)

    y = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (found,), _ = solve(edge, (y,), adaptive(gradient="adjoint"), parameters=[weight], label="base")
    with pytest.raises(SolverError, match="base: the adjoint"):
        found.sum().backward()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"method": "rk5"}, "'rk5' with fixed steps: choose one of euler"),
        ({"method": "midpoint", "steps": 0}, "adaptive steps.*dopri5"),
        ({"method": "dopri5", "steps": 10}, "fixed steps"),
        ({"gradient": "adjoint"}, "steps = 0"),
        ({"method": "dopri5", "steps": 0, "gradient": "checkpoint"}, "steps > 0"),
        ({"gradient": "reverse"}, "direct, checkpoint, adjoint"),
        ({"spacing": 0.0}, "spacing must be positive"),
        ({"rtol": -1e-5}, "rtol must be positive"),
        ({"atol": float("nan")}, "atol must be positive"),
        ({"max_evaluations": 0}, "max_evaluations must be positive"),
        ({"method": "dopri5", "steps": -1}, "0 or more"),
        ({"first_step": -0.1}, "0 or more"),
        ({"first_step": math.nan}, "0 or more"),
        ({"rtol": math.inf}, "finite"),
        ({"spacing": math.nan}, "finite"),
    ],
)
def test_wrong_settings_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        Solver(**wrong)


# -- gradients --------------------------------------------------------------------------------


class Late(Field):
    """A field from t = 0.2 on: near 0 the residual one changes too fast for few fixed steps."""

    def __init__(self, field):
        super().__init__()
        self.field, self.context, self.run_parameters = field, field.context, field.run_parameters

    def run(self, t, y, context):
        return self.field.run(t + 0.2, y, context)


def conditional_flow(kind):
    """A flow, and all tensors that its likelihood depends on, by name."""
    torch.manual_seed(0)
    field = awake(build(kind, 1, 1, width=4, depth=1), size=0.2)
    generator = torch.Generator().manual_seed(3)
    y, coarse = torch.randn(2, 1, 1, 2, 2, generator=generator, dtype=torch.float64)
    return ContinuousFlow([Late(field)]), {
        "y": [y.requires_grad_()],
        "coarse image": [coarse.requires_grad_()],
        **{name: [parameter] for name, parameter in field.named_parameters()},
    }


def objective(flow, inputs, solver):
    result = flow.log_prob(
        inputs["y"][0],
        inputs["coarse image"][0],
        solver=solver,
        trace=Trace("exact"),
        end=0.6,
        regularise=True,
    )
    return (result.log_prob + 0.3 * result.kinetic + 0.2 * result.frobenius).sum()


FIXED_SOLVER = Solver("rk4", steps=10, spacing=1.0)


@functools.cache
def numerical_derivatives(kind):
    """Central differences along one random direction of each tensor."""
    flow, inputs = conditional_flow(kind)
    generator = torch.Generator().manual_seed(4)
    found = {}
    for key, tensors in inputs.items():
        directions = [
            torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in tensors
        ]
        ends = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                for tensor, direction in zip(tensors, directions, strict=True):
                    tensor.add_(direction, alpha=step)
                ends.append(objective(flow, inputs, FIXED_SOLVER).item())
                for tensor, direction in zip(tensors, directions, strict=True):
                    tensor.sub_(direction, alpha=step)
        found[key] = directions, (ends[0] - ends[1]) / 2e-5
    return found


@pytest.mark.parametrize(
    "solver, tolerance",
    [
        (FIXED_SOLVER, 1e-7),
        (adaptive(tolerance=1e-6), 1e-4),
        (adaptive(tolerance=1e-6, gradient="adjoint"), 1e-4),
    ],
    ids=["fixed", "adaptive", "adjoint"],
)
@pytest.mark.parametrize("kind", FIELDS)
def test_gradients_match_finite_differences(kind, solver, tolerance):
    flow, inputs = conditional_flow(kind)
    flat = [tensor for tensors in inputs.values() for tensor in tensors]
    found = iter(torch.autograd.grad(objective(flow, inputs, solver), flat))
    for key, (directions, expected) in numerical_derivatives(kind).items():
        along = sum((next(found) * direction).sum() for direction in directions).item()
        assert abs(expected) > 1e-4, key
        assert along == pytest.approx(expected, rel=tolerance, abs=tolerance), key


@pytest.mark.parametrize("kind", FIELDS)
def test_checkpointing_changes_nothing(kind):
    gradients = []
    for solver in (Solver(steps=3), Solver(steps=3, gradient="checkpoint")):
        flow, inputs = conditional_flow(kind)
        flat = [tensor for tensors in inputs.values() for tensor in tensors]
        gradients.append(torch.autograd.grad(objective(flow, inputs, solver), flat))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
