"""What every flow must keep, and what linear flows and tiny ones are known to be.

A new flow is one more line in FLOWS.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fields import LinearField, awake, matrix

from mrcnf.errors import UserError
from mrcnf.flows import trace as tracing
from mrcnf.flows.base import Flow, Leave, Lift
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.coupling import CouplingFlow
from mrcnf.flows.multiscale import MultiscaleFlow
from mrcnf.flows.paper_field import PaperField
from mrcnf.flows.residual_field import ResidualField
from mrcnf.flows.shuffle import SHUFFLES
from mrcnf.flows.solve import FIXED, Solver, SolverError
from mrcnf.flows.tiled import Tiled
from mrcnf.flows.trace import Trace
from mrcnf.model.building import build_flow
from mrcnf.model.settings import FieldConfig, FlowConfig

EXACT = Trace("exact")
TIGHT = Solver("dopri5", steps=0, rtol=1e-8, atol=1e-8)
ADAPTIVE = Solver("dopri5", steps=0, rtol=1e-5, atol=1e-5)
STEPS = Solver("midpoint", steps=4)



def continuous(fields, shape=(1, 2, 3)):
    return shape, lambda: ContinuousFlow(fields())


def built(kind, shape, coarse=0, **flow):
    settings = FlowConfig(kind, couplings=2, **flow)
    field = FieldConfig("paper" if kind == "continuous" else "residual", width=4, depth=1)
    return shape, lambda: build_flow(settings, field, shape[0], coarse)


def tiles(side, entry, shape):
    return shape, lambda: Tiled(entry[1](), side)


def split(kind, shuffle, shape=(1, 4, 4), **flow):
    return built(kind, shape, **{"splits": 1, "shuffle": shuffle, **flow})


# By name: the shape of its input, and how it is made. A coarse image has two channels.
FLOWS = {
    "linear": continuous(lambda: [LinearField(matrix(6), torch.ones(6, dtype=torch.float64))]),
    "linear, 2 blocks": continuous(lambda: [LinearField(matrix(6, seed)) for seed in (1, 2)]),
    "paper": continuous(lambda: [PaperField(1, hidden=(5, 6))]),
    "paper, 2 blocks": continuous(lambda: [PaperField(1, hidden=(5,)) for _ in range(2)]),
    "paper, coarse": continuous(lambda: [PaperField(1, 2, hidden=(5, 6))]),
    "residual": continuous(lambda: [ResidualField(1, width=4, depth=1)]),
    "residual, coarse": continuous(lambda: [ResidualField(1, 2, width=4, depth=2)]),
    "tiles, coarse": tiles(
        1, continuous(lambda: [ResidualField(1, 2, width=4, depth=1)]), (1, 2, 3)),
    "residual, 2 blocks, coarse": continuous(
        lambda: [ResidualField(1, 2, width=4, depth=1) for _ in range(2)]
    ),
    "coupling, 1 channel": built("coupling", (1, 2, 2)),
    "coupling, 1 channel, coarse": built("coupling", (1, 2, 4), 2),
    "coupling, 2 channels": built("coupling", (2, 2, 3)),
    "coupling, 3 channels, coarse": built("coupling", (3, 2, 2), 2),
    **{f"split coupling, {name}": split("coupling", name) for name in SHUFFLES},
    **{f"split coupling, {name}, conditional, coarse": split(
        "coupling", name, prior="conditional", coarse=2) for name in SHUFFLES},
    "split coupling, context, conditional": split("coupling", "context", prior="conditional"),
    "split coupling, 3 channels": split("coupling", "random", (3, 4, 4)),
    "split coupling, twice, coarse": split(
        "coupling", "context", (1, 8, 8), splits=2, prior="conditional", coarse=2),
    **{f"split continuous, {name}": split("continuous", name) for name in SHUFFLES},
    **{f"split continuous, {name}, conditional, coarse": split(
        "continuous", name, prior="conditional", coarse=2) for name in ("none", "context")},
    "tiles, split coupling, coarse": tiles(
        4, split("coupling", "context", prior="conditional", coarse=2), (1, 4, 8)),
}  # fmt: skip
# Of these nothing is their own but an order that couplings are split by as well.
SLOW = [f"split continuous, {name}" for name in SHUFFLES if name != "none"]
SLOW += [f"split coupling, {name}, conditional, coarse" for name in ("random", "entropy")]


def quick(names, slow=SLOW):
    return [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in names]


EVERY = pytest.mark.parametrize("name", quick(FLOWS))
SOLVED = [name for name, (_, make) in FLOWS.items() if make().solved]
EXACTLY = [name for name in FLOWS if name not in SOLVED]


def make(name):
    return FLOWS[name][1]()


def case(name, n=2, size=0.15):
    """A flow, its input and its coarse image of two channels."""
    torch.manual_seed(0)
    shape = FLOWS[name][0]
    flow = awake(make(name), size).eval()
    coarse = torch.randn(n, 2, *shape[1:], dtype=torch.float64) if "coarse" in name else None
    y = torch.randn(n, *shape, dtype=torch.float64)
    if flow.reorders:
        flow.reorder(y * torch.linspace(3, 1, y[0].numel()).reshape(shape), coarse, STEPS)
    return flow, y, coarse


def normal(z):
    return -0.5 * (z.square().sum() + z.numel() * math.log(2 * math.pi))


def reference(flow, y, coarse, steps):
    """log p and latent of one image (C, H, W), given one coarse image or None.

    By autograd's Jacobian, a Runge–Kutta loop and torch.distributions, nothing else.
    """
    if isinstance(flow, Tiled):
        side, latent, total = flow.side, torch.empty_like(y), 0.0
        for i in range(0, y.shape[1], side):
            for j in range(0, y.shape[2], side):
                tile = (..., slice(i, i + side), slice(j, j + side))
                log_prob, latent[tile] = reference(flow.flow, y[tile], coarse[tile], steps)
                total = total + log_prob
        return total, latent
    if isinstance(flow, MultiscaleFlow):
        return scale(flow, 0, y, None if coarse is None else folded(coarse), steps)
    condition = None if coarse is None else coarse[None]
    state, total = y.flatten(), 0.0
    if isinstance(flow, CouplingFlow):

        def push(flat):
            return flow.transport(flat.reshape(1, *y.shape), condition).flatten()

        jacobian = torch.autograd.functional.jacobian(push, state)
        latent = push(state).detach()
        return normal(latent) + torch.linalg.slogdet(jacobian).logabsdet, latent.reshape(y.shape)
    grid = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** 2
    for field in flow.fields:

        def rates(t, flat, field=field):
            def f(flat):
                return field(t, flat.reshape(1, *y.shape), condition).flatten()

            return f(flat).detach(), torch.func.jacrev(f)(flat).trace().item()

        for t, h in zip(grid[:-1], grid.diff(), strict=True):
            k1, d1 = rates(t, state)
            k2, d2 = rates(t + h / 2, state + h / 2 * k1)
            k3, d3 = rates(t + h / 2, state + h / 2 * k2)
            k4, d4 = rates(t + h, state + h * k3)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return normal(state) + total, state.reshape(y.shape)


def folded(y):
    """(C, H, W) → (4C, H/2, W/2), the four pixels of a square one after the other."""
    return torch.cat([y[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])


def unfolded(z):
    y = z.new_empty(len(z) // 4, 2 * z.shape[1], 2 * z.shape[2])
    for part, (i, j) in zip(z.chunk(4), ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        y[:, i::2, j::2] = part
    return y


def scale(flow, i, y, told, steps):
    """`reference` of a split flow from its i-th scale on."""
    log_prob, latent = reference(flow.flows[i], folded(y), told, steps)
    if i == flow.splits:
        return log_prob, unfolded(latent)
    gate, condition = flow.gates[i], None if told is None else told[None]
    order = gate.shuffle.order(latent[None], condition).flatten()
    stays, leaves = latent[order].chunk(2)
    prior = torch.distributions.Normal(torch.zeros_like(leaves), torch.ones_like(leaves))
    if gate.prior is not None:
        known = stays if told is None else torch.cat((stays, told))
        mean, raw = gate.prior(known[None])[0].detach().chunk(2)
        prior = torch.distributions.Normal(mean, (2 * (raw / 2).tanh()).exp())
    below, rest = scale(flow, i + 1, stays, None if told is None else F.avg_pool2d(told, 2), steps)
    noise = (leaves - prior.mean) / prior.stddev
    total = log_prob - normal(latent) + prior.log_prob(leaves).sum() + below
    return total, unfolded(torch.cat((rest, noise)))


@EVERY
def test_log_prob_is_the_brute_force_one(name):
    flow, y, coarse = case(name)
    found = flow.log_prob(y, coarse, solver=Solver("rk4", steps=6), trace=EXACT)
    log_prob, latent = reference(flow, y[1], None if coarse is None else coarse[1], steps=6)
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
    volume = torch.linalg.slogdet(jacobian.flatten(1)).logabsdet
    found = flow.log_prob(y, coarse, solver=ADAPTIVE, trace=EXACT).log_prob[0]
    assert volume.abs() > 2e-2
    assert (found - normal(latent[0]) - volume).abs() < (1e-3 if flow.solved else 1e-10)


@EVERY
def test_samples_are_of_the_density(name):
    """From noise to an image by one Jacobian, and the image's density."""
    flow, noise, coarse = case(name, n=1)
    dims = noise.numel()
    copies = noise.expand(dims, -1, -1, -1).clone().requires_grad_()
    conditions = None if coarse is None else coarse.expand(dims, -1, -1, -1)
    sample = flow.transport(copies, conditions, backwards=True, solver=ADAPTIVE)
    identity = torch.eye(dims, dtype=torch.float64).reshape(sample.shape)
    (jacobian,) = torch.autograd.grad(sample, copies, identity)
    volume = torch.linalg.slogdet(jacobian.flatten(1)).logabsdet
    found = flow.log_prob(sample[:1].detach(), coarse, solver=ADAPTIVE, trace=EXACT)
    assert (found.log_prob[0] - normal(noise) + volume).abs() < (5e-3 if flow.solved else 1e-9)
    close = 1e-3 if flow.solved else 1e-10
    torch.testing.assert_close(found.latent, noise, rtol=0, atol=close)


@EVERY
def test_transport_backwards_undoes_transport(name):
    flow, y, coarse = case(name)
    with torch.no_grad():
        latent = flow.transport(y, coarse, solver=TIGHT)
        back = flow.transport(latent, coarse, backwards=True, solver=TIGHT)
    assert (latent - y).abs().max() > 1e-2
    torch.testing.assert_close(back, y, rtol=0, atol=1e-3 if flow.solved else 1e-10)


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
    # Orders are steps of their parameters, whose gradients are made up: see test_shuffle.
    tensors = [*inputs, *(p for key, p in flow.named_parameters() if ".shuffle." not in key)]
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
        if value is None:
            assert key in ("kinetic", "frobenius") and not flow.solved
            continue
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
    again = make(name).double().eval()
    again.load_state_dict(torch.load(tmp_path / "flow.pt", weights_only=True))
    before, after = (f.log_prob(y, coarse, solver=STEPS, trace=EXACT) for f in (flow, again))
    assert torch.equal(before.log_prob, after.log_prob)


@pytest.mark.parametrize("name", quick(SOLVED))
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


def walk(flow, y, *args, **how):
    """The steps of a flow, and what comes to each."""
    for step in flow.steps(*args, **how):
        yield step, y
        y = y[:, : step.stays] if isinstance(step, Leave) else step.forward(y)


def through(flow, y, *args, **how):
    """Latents and log-density by the steps alone."""
    left, total = [], 0.0
    for step in flow.steps(*args, **how):
        if isinstance(step, Leave):
            y, leaves = y.tensor_split([step.stays], dim=1)
            mean, log_std = step.prior(y)
            prior = torch.distributions.Normal(mean, log_std.exp())
            total = total + prior.log_prob(leaves).flatten(1).sum(1)
            left.append((leaves - mean) / log_std.exp())
        else:
            total = total + step.log_scale(y).flatten(1).sum(1)
            y = step.forward(y)
    total = total + torch.stack([normal(z) for z in y])
    return MultiscaleFlow.pack(y, left) if left else y, total


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("name", quick(SOLVED))
def test_steps_are_the_same_map(name, method):
    flow, y, coarse = case(name)
    solver = Solver(method, steps=5)
    z, _ = through(flow, y, coarse, solver)
    with torch.no_grad():
        expected = flow.transport(y, coarse, solver=solver)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", EXACTLY)
def test_exact_steps_are_the_same_map_and_add_up_to_the_density(name):
    flow, y, coarse = case(name)
    latent, log_prob = through(flow, y, coarse)
    found = flow.log_prob(y, coarse)
    torch.testing.assert_close(log_prob, found.log_prob, rtol=0, atol=1e-10)
    torch.testing.assert_close(latent, found.latent, rtol=0, atol=1e-11)


@EVERY
@pytest.mark.parametrize("tolerance", [1e-4, 1e-12])
def test_steps_are_undone_to_the_accuracy_asked_for(name, tolerance):
    flow, y, coarse = case(name)
    for step, x in walk(flow, y, coarse, Solver("midpoint", steps=12), tolerance=tolerance):
        if isinstance(step, Leave):
            continue
        z = step.forward(x)
        back = step.backward(z)
        assert (step.forward(back) - z).abs().max() <= tolerance
        # Off by no more than that, times what the inverse stretches it by.
        assert (back - x).abs().max() <= 20 * tolerance
        assert not step.kept or torch.equal(z[:, : step.kept], x[:, : step.kept])
        assert z.shape != x.shape or (z - x).abs().max() > 1e-4


@EVERY
def test_the_scale_of_a_step_is_the_diagonal_of_its_jacobian(name):
    flow, y, coarse = case(name, n=1)
    # One copy of the image for each direction.
    dims = y.numel()
    copies = y.expand(dims, -1, -1, -1)
    conditions = None if coarse is None else coarse.expand(dims, -1, -1, -1)
    solver, h = Solver("bosh3", steps=3), 1e-5
    for step, x in walk(flow, copies, conditions, solver, trace=EXACT):
        if isinstance(step, Leave):
            continue
        # Differences: steps are not differentiable, nor need to be.
        size = x[0].numel()
        basis = torch.eye(dims, size, dtype=torch.float64).reshape(x.shape) * h
        rise = ((step.forward(x + basis) - step.forward(x - basis)) / (2 * h))[:size].flatten(1)
        log_scale = step.log_scale(x)[0].flatten()
        if isinstance(step, Lift):
            assert torch.linalg.slogdet(rise).logabsdet.abs() < 1e-8 and not log_scale.any()
            continue
        torch.testing.assert_close(log_scale.exp(), rise.diag(), rtol=0, atol=1e-8)
        assert (rise.diag() - 1).abs().max() > 1e-5
        if step.kept:  # of the others, each changes with what is kept and with itself alone
            others = rise[step.kept * x[0, 0].numel() :, step.kept * x[0, 0].numel() :]
            assert (others - others.diag().diag()).abs().max() < 1e-8


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lifts_are_exact_on_a_lattice(name, dtype):
    flow, y, coarse = case(name)
    flow, y = flow.to(dtype), y.to(dtype)
    coarse = None if coarse is None else coarse.to(dtype)

    def rounded(x):
        return (x * 4096).round() / 4096

    for step, x in walk(flow, y, coarse, Solver("midpoint", steps=12)):
        if not isinstance(step, Lift):
            continue
        x = rounded(x)
        z = step.lift(x, rounded)
        assert torch.equal(step.drop(z, rounded), x)
        assert torch.equal(rounded(z), z)
        torch.testing.assert_close(z, step.forward(x), rtol=0, atol=0.01)


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
    solver = Solver("midpoint", steps=12)
    alone = flow.steps(None if coarse is None else coarse[1:2], solver)
    for (step, x), single in zip(walk(flow, y, coarse, solver), alone, strict=True):
        if isinstance(step, Leave):
            x = x[:, : step.stays]
            pairs = zip(step.prior(x), single.prior(x[1:2]), strict=True)
        else:
            z = step.forward(x)
            pairs = [(step.forward(x), single.forward(x[1:2])),
                     (step.backward(z), single.backward(z[1:2])),
                     (step.log_scale(x), single.log_scale(x[1:2]))]  # fmt: skip
        for of_batch, of_image in pairs:
            torch.testing.assert_close(of_batch[1:2], of_image, rtol=0, atol=1e-13)


@EVERY
def test_steps_work_in_single_precision(name):
    flow, y, coarse = case(name)
    flow, y = flow.float(), y.float()
    coarse = None if coarse is None else coarse.float()
    for step, x in walk(flow, y, coarse, Solver("midpoint", steps=12), tolerance=1e-5):
        if isinstance(step, Leave):
            assert all(part.dtype == torch.float32 for part in step.prior(x[:, : step.stays]))
            continue
        z = step.forward(x)
        assert z.dtype == torch.float32
        torch.testing.assert_close(step.backward(z), x, rtol=0, atol=2e-4)


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


BITS = [name for name, (shape, _) in FLOWS.items()
        if math.prod(shape) <= 16 and (name not in SLOW or "coupling" in name)]
FEW = ["paper, coarse", "residual", "coupling, 1 channel", "coupling, 2 channels",
       "split coupling, none", "split coupling, context, conditional, coarse"]


@pytest.mark.parametrize("name", quick(BITS, set(BITS) - set(FEW)))
def test_the_bounds_of_all_images_of_bits_add_up_to_less_than_one(name):
    """An image is a cell of side 2 about the origin; points drawn in it give its bound."""
    flow, _, coarse = case(name, n=1, size=0.05)
    flow = flow.float()
    shape = FLOWS[name][0]
    dims = math.prod(shape)
    draws = max(2, (640 if flow.solved else 4_000) // 2**dims)
    corners = torch.arange(2**dims)[:, None] >> torch.arange(dims) & 1
    corners = corners.float().reshape(-1, *shape)
    log_probs = torch.empty(draws, 2**dims)
    with torch.no_grad():
        if not flow.solved:
            told = None if coarse is None else coarse.float().expand(512, -1, -1, -1)
            flow.initialise(torch.randn(512, *shape), told)
        for draw in range(draws):
            y = 2 * (corners + torch.rand(corners.shape)) - 2
            found = []
            for part in y.split(4096):
                told = None if coarse is None else coarse.float().expand(len(part), -1, -1, -1)
                solver = Solver("rk4", steps=5 if dims < 10 else 2)
                found.append(flow.log_prob(part, told, solver=solver, trace=EXACT).log_prob)
            log_probs[draw] = torch.cat(found).double() + dims * math.log(2)
    probabilities = log_probs.double().exp()
    mass, error = probabilities.mean(0).sum(), (probabilities.var(0) / draws).sum().sqrt()
    assert 0.1 < mass < 1 + 4 * error and error < 0.1
    assert log_probs.mean(0).double().exp().sum() < mass


@pytest.mark.parametrize("wrong", [{"method": "approximate"}, {"probes": 0}, {"kind": "uniform"}])
def test_wrong_trace_settings_are_refused(wrong):
    with pytest.raises(UserError, match="trace"):
        Trace(**wrong)
