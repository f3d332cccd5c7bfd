"""The networks: their size, their layout, and tangents that are their derivatives."""

import pytest
import torch
import torch.nn.functional as F
from fields import awake
from torch import nn

from mrcnf.errors import UserError
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.fields import build
from mrcnf.flows.paper_field import PaperField
from mrcnf.flows.paths import PATHS
from mrcnf.flows.residual_field import TIME_FEATURES, ResidualField, time_features
from mrcnf.flows.solve import Solver
from mrcnf.flows.tangents import Dual
from mrcnf.flows.trace import Trace
from mrcnf.flows.velocity import Conditioned

FIELDS = {
    "paper": lambda: PaperField(2, hidden=(5, 6)),
    "paper, coarse": lambda: PaperField(2, 1, hidden=(5, 6)),
    "residual": lambda: ResidualField(2, width=6, depth=2),
    "residual, coarse": lambda: ResidualField(2, 1, width=6, depth=2),
    "attention, coarse": lambda: ResidualField(2, 1, width=6, depth=2, attention=True),
    "u-shaped": lambda: ResidualField(2, width=4, depth=1, scales=3, attention=True),
    "u-shaped, coarse": lambda: ResidualField(2, 1, width=4, depth=2, scales=2),
    "variance-preserving": lambda: ResidualField(2, width=6, depth=1, path="variance-preserving"),
    "lattice": lambda: seeing(ResidualField(2, width=6, depth=1, lattice=2)),
    "lattice, coarse": lambda: seeing(ResidualField(2, 1, width=6, depth=1, lattice=4)),
}


def seeing(field):
    """A field that is told where the integers are, and of noise in the data."""
    lattice = field.lattice
    size = lattice.of_y.shape[1] + lattice.of_coarse.shape[1] + 1
    generator = torch.Generator().manual_seed(0)
    field.calibrate(torch.tensor(0.1), torch.randn(len(lattice.offset), size, generator=generator))
    return field


def case(name, n=3):
    """A field, its input and its coarse image, on images that are not square."""
    field = awake(FIELDS[name]())
    height, width = (4, 8) if "u-shaped" in name else (3, 4)
    coarse = torch.randn(n, 1, height, width, dtype=torch.float64) if "coarse" in name else None
    return field, torch.randn(n, 2, height, width, dtype=torch.float64), coarse


def parameters(field):
    return sum(p.numel() for p in field.parameters())


def test_the_papers_numbers_of_parameters():
    assert parameters(PaperField(3)) == 79_134
    assert parameters(PaperField(9, 3)) == 87_834


class Concatenating(nn.Module):
    """The paper's network as published: time is a constant first channel of every layer."""

    def __init__(self, field):
        super().__init__()
        self.layers = field.layers

    def forward(self, t, y, coarse=None):
        x = y if coarse is None else torch.cat((y, coarse), dim=1)
        for i, layer in enumerate(self.layers):
            if i:
                x = F.softplus(x)
            clock = torch.ones_like(x[:, :1]) * torch.as_tensor(t).reshape(-1, 1, 1, 1)
            x = layer(torch.cat((clock, x), dim=1))
        return x


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, [0.1, 0.5, 0.9]])
@pytest.mark.parametrize("name", ["paper", "paper, coarse"])
def test_the_papers_field_concatenates_time_and_coarse_image(name, t):
    field, y, coarse = case(name)
    t = torch.tensor(t, dtype=torch.float64)
    expected = Concatenating(field)(t, y, coarse)
    torch.testing.assert_close(field(t, y, coarse), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [6, 100, 130])
def test_heads_divide_any_width(width):
    field = ResidualField(2, width=width, depth=1, attention=True)
    assert field(torch.tensor(0.5), torch.randn(1, 2, 2, 2)).shape == (1, 2, 2, 2)


def test_a_new_paper_field_stands_still():
    field = PaperField(3, 3)
    y, coarse = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(field(torch.tensor(0.4), y, coarse), torch.zeros_like(y))


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_a_new_residual_field_is_the_best_linear_prediction(t):
    field = ResidualField(2, 1, width=4, depth=1).double()
    y, coarse = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 1, 4, 4).double()
    # Regress z - y on (1-t)·y + t·z for independent unit normals: covariance over variance.
    slope = (t - (1 - t)) / ((1 - t) ** 2 + t**2)
    found = field(torch.tensor(t, dtype=torch.float64), y, coarse)
    torch.testing.assert_close(found, slope * y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_field_that_knows_the_spread_knows_the_density(path, noise):
    """With log q right and F = 0, normal data and their noise reach the unit normal."""
    field = ResidualField(2, width=4, depth=1, path=path).double()
    spread = torch.tensor([0.3, 1.7], dtype=torch.float64)
    with torch.no_grad():
        field.last.bias[2:] = spread.log()
        field.noise.fill_(noise)
    y = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    solver = Solver("dopri5", steps=0, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        found = ContinuousFlow([field]).log_prob(y, solver=solver, trace=Trace("exact")).log_prob
    total = (spread**2 + noise**2).sqrt()[:, None, None]
    expected = torch.distributions.Normal(torch.zeros(()), total).log_prob(y).flatten(1).sum(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.5, 1.0])
@pytest.mark.parametrize("log_spread", [-60.0, -14.0, 14.0, 60.0])
def test_wild_spreads_stay_finite_in_single_precision(log_spread, t):
    field = ResidualField(2, width=4, depth=1)
    with torch.no_grad():
        field.last.bias[2:] = log_spread
    y, tangents = torch.randn(1, 2, 4, 4), torch.randn(1, 1, 2, 4, 4)
    for part in field.push(torch.tensor(t), y, tangents, None):
        assert part.isfinite().all()
        field.zero_grad()
        part.sum().backward(retain_graph=True)
        assert all(p.grad is None or p.grad.isfinite().all() for p in field.parameters())


@pytest.mark.parametrize("name", FIELDS)
def test_times_of_their_own_equal_a_loop(name):
    field, y, coarse = case(name)
    t = torch.tensor([0.0, 0.35, 1.0], dtype=torch.float64)
    rows = [
        field(t[i], y[i : i + 1], None if coarse is None else coarse[i : i + 1]) for i in range(3)
    ]
    torch.testing.assert_close(field(t, y, coarse), torch.cat(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", ["one", "per image"])
@pytest.mark.parametrize("name", FIELDS)
def test_push_is_the_directional_derivative(name, times):
    field, y, coarse = case(name)
    t = torch.tensor([0.1, 0.5, 0.9] if times == "per image" else 0.3, dtype=torch.float64)
    tangents = torch.randn(4, *y.shape, dtype=torch.float64)
    value, pushed = Conditioned(field, coarse).push(t, y, tangents)
    torch.testing.assert_close(value, field(t, y, coarse), rtol=1e-12, atol=1e-12)
    for tangent, found in zip(tangents, pushed, strict=True):
        _, expected = torch.func.jvp(lambda y: field(t, y, coarse), (y,), (tangent,))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", FIELDS)
def test_images_do_not_see_each_other(name):
    field, y, coarse = case(name)
    t = torch.tensor(0.3, dtype=torch.float64)
    before = field(t, y, coarse)
    changed = y.clone()
    changed[0] += 1
    after = field(t, changed, coarse)
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-13)
    assert (after[0] - before[0]).abs().min() > 0


@pytest.mark.parametrize("name", ["paper, coarse", "residual, coarse"])
def test_the_coarse_image_matters(name):
    field, y, coarse = case(name)
    t = torch.tensor(0.3, dtype=torch.float64)
    changed = coarse.clone()
    changed[0] += 1
    difference = field(t, y, changed) - field(t, y, coarse)
    assert difference[0].abs().min() > 1e-6 and difference[1:].abs().max() < 1e-13


@pytest.mark.parametrize("name", FIELDS)
def test_every_parameter_matters(name):
    field, y, coarse = case(name)
    t = torch.tensor(0.3, dtype=torch.float64)
    field(t, y, coarse).square().sum().backward()
    for key, parameter in field.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ["residual, coarse", "paper, coarse"])
def test_run_parameters_are_those_that_the_context_does_not_use(name):
    field, y, coarse = case(name)
    context = field.context(coarse)
    if isinstance(context, tuple):
        detached = tuple(part.detach() for part in context)
    else:
        detached = context.detach()
    # Adding y makes a graph even where the context was all that had one.
    out = field.run(torch.tensor(0.3).double(), Dual(y.requires_grad_(), None), detached)
    out = out.value
    everything = list(field.parameters())
    used = torch.autograd.grad(out.sum(), everything, allow_unused=True)
    expected = {id(p) for p, gradient in zip(everything, used, strict=True) if gradient is not None}
    assert {id(p) for p in field.run_parameters()} == expected


def test_the_slope_is_the_derivative():
    x = torch.linspace(-30, 30, 121, dtype=torch.float64, requires_grad=True)
    found = Dual(x, torch.ones_like(x)[None]).silu()
    torch.testing.assert_close(found.value, F.silu(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(Dual(x, None).silu().value, F.silu(x))
    (expected,) = torch.autograd.grad(F.silu(x).sum(), x)
    torch.testing.assert_close(found.tangents[0], expected, rtol=0, atol=1e-12)


def test_time_features_are_finite_at_and_beyond_the_ends():
    t = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1], dtype=torch.float64, requires_grad=True)
    features = time_features(t)
    assert features.shape == (5, TIME_FEATURES) and features.isfinite().all()
    assert torch.equal(features[0], features[1]) and torch.equal(features[3], features[4])
    assert torch.equal(features[2, :1], torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("kind, expected", [("residual", ResidualField), ("paper", PaperField)])
def test_fields_are_built_by_name(kind, expected):
    field = build(kind, 3, 1, width=8, depth=2)
    assert type(field) is expected
    y = torch.randn(2, 3, 4, 4)
    assert field(torch.tensor(0.5), y, torch.randn(2, 1, 4, 4)).shape == y.shape


def test_an_unknown_field_is_refused():
    with pytest.raises(UserError, match=r"'unet'.*residual, paper"):
        build("unet", 3)


@pytest.mark.parametrize("name", ["paper, coarse", "residual, coarse"])
def test_tangents_are_in_single_precision_where_the_network_is_not(name):
    """Traces are sums of many products; the last one of bfloat16 numbers would be one of them."""
    field, y, coarse = case(name)
    field, y, coarse = field.float(), y.float(), coarse.float()
    with torch.autocast("cpu", torch.bfloat16):
        f, tangents = Conditioned(field, coarse), torch.ones(2, *y.shape)
        value, pushed = f.push(torch.tensor(0.3), y, tangents)
    assert value.dtype == pushed.dtype == torch.float32


def test_adding_duals_adds_them():
    a = Dual(torch.tensor(2.0), torch.tensor([3.0]))
    both = a + a
    assert (both.value, both.tangents) == (4.0, 6.0)
    product = a * a
    assert (product.value, product.tangents) == (4.0, 12.0)
