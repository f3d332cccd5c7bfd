"""Divergences: exact against autograd's Jacobian, estimates unbiased with the known variance."""

import math

import pytest
import torch
from fields import LinearField, awake, matrix

from mrcnf.errors import UserError
from mrcnf.flows import trace
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.paper_field import PaperField
from mrcnf.flows.residual_field import ResidualField
from mrcnf.flows.velocity import Conditioned

T = torch.tensor(0.3, dtype=torch.float64)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def swirl(t, y):
    """Not a Field: nonlinear, every output depends on every input of its row."""
    flat = y.flatten(1)
    return (torch.sin(flat + t) * flat.roll(1, 1) + flat.square().mean(1, keepdim=True)).view_as(y)


def residual():
    return Conditioned(awake(ResidualField(3, 1, width=6, depth=2)), normal(2, 1, 2, 4))


def paper():
    return Conditioned(awake(PaperField(3, 1, hidden=(5, 5))), normal(2, 1, 2, 4))


def calibrated():
    """Its field has a head, which knows a matrix that has nothing to do with the Jacobian."""
    f = residual()
    f.field.near = awake(f.field.new_near(), 0.3)
    return f


class ByJvp:
    """A field whose tangents autograd pushes, one by one."""

    def __init__(self, f):
        self.f = f

    def push(self, t, y, tangents):
        pairs = [torch.func.jvp(lambda y: self.f(t, y), (y,), (e,)) for e in tangents]
        return pairs[0][0], torch.stack([pushed for _, pushed in pairs])


def network():
    """No Field, and so no push: it goes through torch.func.jvp."""
    convolution = torch.nn.Conv2d(3, 3, 3, padding=1).double()
    return lambda t, y: torch.tanh(convolution(y) * t)


FUNCTIONS = {"swirl": lambda: swirl, "network": network, "residual": residual, "paper": paper}


def jacobians(f, y):
    """(N, D, D), one row of the batch at a time, by autograd."""
    dims = y[0].numel()
    rows = []
    for i in range(len(y)):
        whole = torch.autograd.functional.jacobian(lambda y, i=i: f(T, y)[i], y)
        rows.append(whole[..., i, :, :, :].reshape(dims, dims))
    return torch.stack(rows)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact_is_the_trace_of_the_jacobian(name):
    f, y = FUNCTIONS[name](), normal(2, 3, 2, 4)
    result = trace.estimate(f, T, y, "exact", None)
    expected = jacobians(f, y)
    torch.testing.assert_close(result.value, f(T, y), rtol=1e-12, atol=1e-12)
    traces = expected.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(result.divergence, traces, rtol=1e-10, atol=1e-11)
    norms = expected.square().sum((1, 2))
    torch.testing.assert_close(result.frobenius, norms, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["residual", "paper"])
@pytest.mark.parametrize("method", ["exact", "hutchinson", "hutch++"])
def test_push_and_jvp_agree(method, name):
    f, y = FUNCTIONS[name](), normal(2, 3, 2, 4)
    probes = trace.draw_probes(y, 3, method=method)
    pushed = trace.estimate(f, T, y, method, probes)
    through_jvp = trace.estimate(ByJvp(f), T, y, method, probes)
    for a, b in zip(pushed, through_jvp, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_exact_does_not_depend_on_how_tangents_are_chunked(monkeypatch):
    f, y = paper(), normal(2, 3, 2, 4)
    whole = trace._exact(f, T, y)
    monkeypatch.setattr(trace, "CHUNK", 5)
    pieces = trace._exact(f, T, y)
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


ESTIMATES = [
    ("hutchinson", "rademacher"),
    ("hutchinson", "gaussian"),
    ("hutch++", "rademacher"),
    ("hutch++", "gaussian"),
    ("calibrated", "rademacher"),
    ("calibrated", "gaussian"),
]


@pytest.mark.parametrize("method, kind", ESTIMATES)
def test_estimates_are_unbiased(method, kind):
    f = calibrated()
    f.context = f.context[:1]
    y = normal(1, 3, 2, 4)
    exact = trace.estimate(f, T, y, "exact", None)
    rows = 4000
    many = y.expand(rows, -1, -1, -1)  # every row has probes of its own
    found = trace.estimate(f, T, many, method, trace.draw_probes(many, 2, method=method, kind=kind))
    for estimates, truth in (
        (found.divergence, exact.divergence),
        (found.frobenius, exact.frobenius),
    ):
        error = estimates.std() / math.sqrt(rows)
        assert error > 0
        assert (estimates.mean() - truth).abs() < 4 * error


@pytest.mark.parametrize("kind", trace.PROBES)
@pytest.mark.parametrize("probes", [1, 4])
def test_the_variance_of_hutchinson_is_known(probes, kind):
    a = matrix(12)
    field = Conditioned(LinearField(a), None)
    symmetric = (a + a.T) / 2
    # Gaussian: 2‖S‖²; Rademacher: twice what is off the diagonal (Avron & Toledo 2011).
    spread = symmetric if kind == "gaussian" else symmetric - symmetric.diagonal().diag()
    expected = 2 * spread.square().sum() / probes
    rows = 8000
    y = normal(rows, 3, 2, 2)
    _, found = trace.divergence(field, T, y, "hutchinson", probes, kind=kind)
    # The excess kurtosis of these quadratic forms is at most 12/K: std of the variance
    # below √((2 + 12)/rows).
    assert abs(found.var() / expected - 1) < 4 * math.sqrt(14 / rows)


class PartlyKnown(Conditioned):
    """A linear field and a matrix that is known of it."""

    def __init__(self, a, k):
        super().__init__(LinearField(a), None)
        self.k = k

    def push_known(self, t, y, tangents):
        known = (tangents.flatten(2) @ self.k.T).reshape(tangents.shape)
        return trace.Known(*self.push(t, y, tangents), known, self.k.trace().expand(len(y)))


def test_what_is_known_takes_its_part_out_of_the_variance():
    a = matrix(12)
    k = torch.where((torch.arange(12) - torch.arange(12)[:, None]).abs() < 6, a, 0.1)
    unknown = (a - k + (a - k).T) / 2
    expected = 2 * (unknown - unknown.diagonal().diag()).square().sum()
    rows = 8000
    _, found = trace.divergence(PartlyKnown(a, k), T, normal(rows, 3, 2, 2), "calibrated", 1)
    assert abs(found.var() / expected - 1) < 4 * math.sqrt(14 / rows)
    assert (found.mean() - a.trace()).abs() < 4 * (expected / rows).sqrt()
    _, whole = trace.divergence(PartlyKnown(a, a), T, normal(3, 3, 2, 2), "calibrated", 1)
    torch.testing.assert_close(whole, a.trace().expand(3), rtol=1e-12, atol=1e-12)


def test_a_head_knows_one_symmetric_matrix_and_its_trace():
    f, y = calibrated(), normal(2, 3, 2, 4)
    basis = torch.eye(24, dtype=y.dtype).reshape(24, 1, 3, 2, 4).expand(-1, 2, -1, -1, -1)
    value, pushed, known, traces = f.push_known(T, y, basis)
    plain = f.push(T, y, basis)
    torch.testing.assert_close((value, pushed), plain, rtol=1e-12, atol=1e-12)
    matrices = known.flatten(2).permute(1, 2, 0)
    assert matrices.abs().sum() > 1
    torch.testing.assert_close(matrices, matrices.mT, rtol=1e-12, atol=1e-12)
    diagonals = matrices.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(traces, diagonals, rtol=1e-12, atol=1e-12)


def test_a_calibrated_trace_of_what_is_not_known_is_refused():
    with pytest.raises(UserError, match=r"calibrated.*push_known"):
        trace.divergence(network(), T, normal(2, 3, 2, 4), "calibrated")
    for f in (residual(), paper()):
        flow = ContinuousFlow([calibrated().field, f.field], name="level 4")
        with pytest.raises(UserError, match=r"level 4: .*mrcnf calibrate"):
            flow.log_prob(normal(2, 3, 2, 4), f.context, trace=trace.Trace("calibrated"))


def test_hutch_plus_plus_is_exact_on_a_jacobian_of_low_rank():
    low_rank = normal(24, 2) @ normal(2, 24)
    field = Conditioned(LinearField(low_rank), None)
    y = normal(3, 6, 2, 2)
    _, found = trace.divergence(field, T, y, "hutch++", 3)
    torch.testing.assert_close(found, low_rank.trace().expand(3), rtol=1e-10, atol=1e-9)


def test_hutch_plus_plus_beats_hutchinson_at_equal_cost():
    # Rank 3 and a little of everything; both take 12 products with the Jacobian.
    nearly_low_rank = normal(24, 3) @ normal(3, 24) + 0.05 * normal(24, 24)
    field = Conditioned(LinearField(nearly_low_rank), None)
    y = normal(400, 6, 2, 2)
    _, plus = trace.divergence(field, T, y, "hutch++", 4)
    _, plain = trace.divergence(field, T, y, "hutchinson", 12)
    assert plus.std() < plain.std() / 5


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_given_probes_are_the_ones_used(method):
    f, y = swirl, normal(2, 3, 2, 4)
    generator = torch.Generator().manual_seed(5)
    drawn = trace.draw_probes(y, 2, method=method, generator=generator)
    _, given = trace.divergence(f, T, y, method, drawn)
    _, again = trace.divergence(f, T, y, method, 2, generator=generator.manual_seed(5))
    assert torch.equal(given, again)
    jacobian = jacobians(f, y)
    if method == "hutchinson":
        expected = torch.einsum("knd,nde,kne->n", drawn.flatten(2), jacobian, drawn.flatten(2)) / 2
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rademacher_probes_are_signs(dtype):
    y = torch.zeros(50, 3, 4, 4, dtype=dtype)
    probes = trace.draw_probes(y, 2)
    assert probes.dtype == dtype and probes.shape == (2, 50, 3, 4, 4)
    assert torch.equal(probes.abs(), torch.ones_like(probes))
    assert probes.mean().abs() < 4 / math.sqrt(probes.numel())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_the_divergence_is_differentiable(method, name):
    f, y = FUNCTIONS[name](), normal(2, 3, 2, 4).requires_grad_()
    probes = trace.draw_probes(y.detach(), 2, method=method)

    def outputs(y):
        return tuple(trace.estimate(f, T, y, method, probes))

    assert torch.autograd.gradcheck(outputs, (y,), fast_mode=True)


def test_the_gradient_of_hutch_plus_plus_is_unbiased():
    # It is not the derivative of the estimate at fixed probes: the basis is held constant.
    y = normal(1, 3, 1, 2).requires_grad_()
    _, exact = trace.divergence(swirl, T, y, "exact")
    (expected,) = torch.autograd.grad(exact.sum(), y)
    many = y.detach().expand(6000, -1, -1, -1).clone().requires_grad_()
    _, estimates = trace.divergence(swirl, T, many, "hutch++", 1)
    (found,) = torch.autograd.grad(estimates.sum(), many)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected[0]).abs() < 4 * error + 1e-12).all()


def test_the_gradient_of_hutch_plus_plus_survives_a_field_of_zeros():
    field = PaperField(2, hidden=(4,)).double()  # its last layer starts at zero
    _, found = trace.divergence(Conditioned(field, None), T, normal(2, 2, 3, 3), "hutch++", 2)
    found.sum().backward()
    last = field.layers[-1].weight.grad
    assert last.isfinite().all() and last.abs().sum() > 0


def test_hutch_plus_plus_with_too_many_probes_is_refused():
    with pytest.raises(UserError, match="5 probes on 4 dimensions"):
        trace.divergence(swirl, T, normal(2, 1, 2, 2), "hutch++", 5)


@pytest.mark.parametrize(
    "wrong", [{"method": "hutch"}, {"probes": 0}, {"probes": -1}, {"kind": "uniform"}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError, match=r"trace|probes"):
        trace.divergence(swirl, T, normal(2, 1, 2, 2), **wrong)
