"""Portable coding: the same bytes and images however sums are made."""

import math
import operator
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from fields import awake
from hypothesis import given, settings
from hypothesis import strategies as st
from small import model, noise, smooth
from test_codec import MODELS, assorted, same

from mrcnf import codec
from mrcnf.codec import container, elementary, sums
from mrcnf.codec.ans import CodingError
from mrcnf.codec.portable import Portable
from mrcnf.codec.settings import Settings, default
from mrcnf.errors import UserError
from mrcnf.flows.residual_field import ResidualField
from mrcnf.model.settings import FieldConfig

RESIDUAL = FieldConfig(width=4, depth=1)


def shuffled(x, weight, stride=1, padding=0, dilation=1, groups=1):
    """A convolution with the products of every sum in a random order, some at a time."""
    columns = F.unfold(x, weight.shape[2:], dilation, padding, stride)
    rows, found = weight.reshape(len(weight), -1), 0
    for part in torch.randperm(rows.shape[1]).chunk(3):
        found = found + rows[:, part] @ columns[:, part]
    side = (x.shape[2] + 2 * padding[0] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    return found.unflatten(2, (side, -1))


def shuffled_conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    pairs = ([n, n] if isinstance(n, int) else n for n in (stride, padding, dilation))
    found = shuffled(x, weight, *pairs)
    return found if bias is None else found + bias[:, None, None]


def network():
    """A field with all that networks have, and what to ask of it."""
    field = ResidualField(3, 3, width=8, depth=1, scales=2, attention=True, lattice=3)
    field = awake(field, 0.2).float().eval().requires_grad_(False)
    field.near = awake(field.new_near(), 0.2).float()
    return field, torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)


def answers(field, y, coarse, dtype=torch.float64):
    """What a codec asks a field."""
    field, y = field.to(dtype), y.to(dtype)
    with torch.no_grad():
        local = field.local(torch.tensor(0.3, dtype=dtype), y, field.context(coarse.to(dtype)))
        return *local[:2], local.neighbours.apply(y)


def test_networks_are_the_same_in_any_order_of_sums(monkeypatch):
    field, y, coarse = network()
    with Portable():
        expected = answers(field, y, coarse)
        each = [answers(field, *one) for one in zip(y.split(1), coarse.split(1), strict=True)]
        assert all(map(torch.equal, expected, map(torch.cat, zip(*each, strict=True))))
        threads = torch.get_num_threads()
        for count in (2, 4):
            torch.set_num_threads(count)
            assert all(map(torch.equal, expected, answers(field, y, coarse)))
        torch.set_num_threads(threads)
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            assert all(map(torch.equal, expected, answers(field, y, coarse)))
    own = sums.convolve
    for change in (
        shuffled,
        lambda x, *others: own(x.transpose(2, 3).contiguous().transpose(2, 3), *others),
        lambda x, weight, *others: own(x, weight.contiguous(), *others),
    ):
        monkeypatch.setattr(sums, "convolve", change)
        with Portable():
            assert all(map(torch.equal, expected, answers(field, y, coarse)))


def test_other_networks_are_not(monkeypatch):
    field, y, coarse = network()
    for dtype in (torch.float32, torch.float64):
        expected = answers(field, y, coarse, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(F, "conv2d", shuffled_conv2d)
            others = answers(field, y, coarse, dtype)
        assert all(torch.allclose(*both, atol=1e-4) for both in zip(expected, others, strict=True))
        assert not all(map(torch.equal, expected, others))


def test_networks_are_nearly_what_they_were_trained_to_be():
    field, y, coarse = network()
    with Portable():
        found = answers(field, y, coarse)
    for one, other in zip(found, answers(field, y, coarse), strict=True):
        assert (one - other).abs().max() < 1e-3 * other.abs().max()


def test_files_are_the_same_in_any_order_of_sums(monkeypatch):
    made, images = model(field=RESIDUAL, dequantisation="variational"), smooth(14, 4)
    usual = torch.get_default_dtype()
    how = {"steps": 1, "portable": True, "bound": False, "verify": False}
    data = codec.encode(made, images, **how).data
    assert min(container.unpack(data).settings["rungs"]["0"]) < 4  # networks were asked
    monkeypatch.setattr(sums, "convolve", shuffled)
    assert codec.encode(made, images, **how).data == data
    assert same(codec.decompress(made, data), list(images))
    assert torch.get_default_dtype() == usual


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_coded(name, monkeypatch):
    made = model(**MODELS[name])
    channels, side = made.config.channels, made.config.finest
    images = [*assorted(channels, side), *smooth(20, side, channels), *noise(5, side, channels)]
    how = {"steps": 3, "verify": False, "bound": False}
    coded = codec.encode(made, images, portable=True, **how)
    monkeypatch.setattr(sums, "convolve", shuffled)
    assert same(codec.decompress(made, coded.data), images) and not coded.stored
    assert len(coded.data) < 1.02 * len(codec.encode(made, images, **how).data) + 50


def test_files_say_that_they_are_portable():
    made, images = model(), smooth(2, 4)
    plain, portable = (codec.compress(made, images, steps=2, portable=p) for p in (False, True))
    assert "portable" not in container.unpack(plain).settings
    table = container.unpack(portable).settings
    assert table["portable"] is True and Settings.from_table(table, made).portable
    for wrong in (False, 1, "yes", None):
        with pytest.raises(UserError, match="not those of this version"):
            Settings.from_table({**table, "portable": wrong}, made)
    with pytest.raises(UserError, match="true or false"):
        Settings(default(made).levels, 8, portable=1)


def test_functions_of_whole_numbers_are_our_own():
    whole = torch.arange(1, 9)
    with Portable():
        found = [whole.exp(), whole.log(), whole.tanh(), whole.sigmoid()]
    own = (elementary.exp, elementary.log, elementary.tanh, elementary.sigmoid)
    wanted = [function(whole.double()) for function in own]
    assert all(map(torch.equal, found, wanted))


def test_what_is_not_known_is_refused_by_name():
    x = torch.ones(2, 2, dtype=torch.float64)
    for name, call in {
        "erf": x.erf, "lerp": lambda: torch.lerp(x, x, 0.5), "std": x.std,
        "index_put": lambda: x.index_put((torch.tensor([0, 0]),), x, accumulate=True),
        "cumsum": lambda: x.cumsum(0), "addmm": lambda: torch.addmm(x, x, x, alpha=2),
        "pow": lambda: torch.pow(x, x), "logcumsumexp": lambda: x.logcumsumexp(0),
    }.items():  # fmt: skip
        with Portable(), pytest.raises(UserError, match=f"does not know torch.{name};"):
            call()
    with Portable(), pytest.raises(UserError, match=r"torch.mul is given torch.float32"):
        x.float() * 2
    made = model(field=RESIDUAL)
    made.level(4).flow.fields[0].first.forward = lambda y: y.map(y.value.erf(), lambda: None)
    with pytest.raises(UserError, match=r"does not know torch.erf; code .* without --portable"):
        codec.compress(made, smooth(20, 4), steps=2, portable=True)


@pytest.mark.slow
def test_values_that_are_not_finite_are_stored():
    made = model()
    images = [*smooth(20, 4), torch.full((1, 4, 4), 255, dtype=torch.uint8)]
    made.level(4).coarse_units.register_forward_hook(
        lambda _, __, found: (found[0].masked_fill(found[0] > 10, float("nan")), found[1])
    )
    made.level(4).coarse_units.mean.fill_(0)
    made.level(4).coarse_units.std.fill_(0.0995)
    coded = codec.encode(made, images, steps=2, bound=False, portable=True)
    assert coded.stored == 1 and same(codec.decompress(made, coded.data), images)


# Sums


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 8]), st.floats(-290, 240),
    st.floats(0, 12), st.floats(-8, 300), st.booleans(),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_convolutions_are_exact(seed, channels, size, spread, reach, extreme):
    """Whatever weights and values: no partial sum goes beyond what double precision holds."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    weight = 10**size * torch.randn(2, channels, 3, 3, **options).sign()
    if not extreme:
        weight *= 10 ** (-spread * torch.rand(weight.shape, **options))
        weight[0, 0] = 0
    x = 10**reach * torch.randn(1, channels, 3, 3, **options)
    x = torch.where(x.abs() > 1e299, torch.copysign(torch.tensor(torch.inf), weight[:1]), x)
    whole, digits = sums.rounded(weight)
    found = sums.Convolutions()(x, weight, None, [1, 1], [0, 0], [1, 1], 1).flatten().tolist()
    largest = 2 ** (digits + sums.RANGE_BITS)
    values = [round(min(max(v * 2.0**digits, -largest), largest)) for v in x.flatten().tolist()]
    for row, answer in zip(whole.flatten(1).tolist(), found, strict=True):
        ratios = [w.as_integer_ratio() for w in row]
        scale = max(denominator for _, denominator in ratios)
        integers = [n * (scale // denominator) for n, denominator in ratios]
        assert sum(map(abs, integers)) * largest <= 2**53 * math.gcd(*integers)
        assert sum(map(operator.mul, integers, values)) == Fraction(answer) * scale
    limit = 2.0**sums.RANGE_BITS
    exact = (weight * x.clamp(-limit, limit)).sum((1, 2, 3))
    error = weight.abs().amax((1, 2, 3)) * weight[0].numel() * (limit * 2**-16 + 2.0**-digits)
    assert bool(((exact - exact.new_tensor(found)).abs() <= error + 1e-230).all())


def test_weights_and_values_that_are_not_finite_are_refused():
    x, weight = torch.ones(1, 2, 4, 4).double(), torch.ones(3, 2, 3, 3).double()
    for wrong in (torch.nan, torch.inf, 1e300):
        with pytest.raises(CodingError, match="weights"):
            sums.rounded(torch.full_like(weight, wrong))
    with Portable(), pytest.raises(CodingError, match="values"):
        F.conv2d(torch.cat((x[:, :1], x[:, :1] * torch.nan), 1), weight)


def test_convolutions_of_every_kind_are_pytorchs():
    weight, x = torch.randn(6, 4, 3, 2).double(), torch.randn(2, 4, 9, 8).double()
    bias = torch.randn(6).double()
    for own, kind in (
        (weight, {}), (weight, {"stride": 2, "padding": 1}), (weight, {"dilation": (2, 1)}),
        (weight[:, :2], {"groups": 2}),
    ):  # fmt: skip
        with Portable():
            found = F.conv2d(x, own, bias, **kind)
        assert torch.allclose(found, F.conv2d(x, own, bias, **kind), atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 48, 100])
def test_short_sums_are_pytorchs(count):
    a, b = torch.randn(5, 4, count).double(), torch.randn(5, count, 3).double()
    x = torch.randn(2, count, 4, 6).double()
    for f in (
        lambda: a @ b, lambda: x.mean(1, keepdim=True), lambda: x.sum((2, -1)), lambda: x.sum(),
        lambda: F.avg_pool2d(x, 2), lambda: x.softmax(1), lambda: F.linear(b.mT, a[0], b[0, 0, 0]),
        lambda: torch.einsum("ij,njhw->nihw", a[0], x), lambda: a[0] @ b[0, :, 0],
        lambda: torch.addcmul(a, a, a, value=0.3), lambda: torch.add(a, a, alpha=0.3),
        lambda: 1 - a, lambda: torch.rsqrt(a * a + 1),
    ):  # fmt: skip
        with Portable():
            found = f()
        assert torch.allclose(found, f(), rtol=1e-13, atol=1e-13)


# Functions


EVERYWHERE = torch.cat([torch.randn(300).double() * 10.0**i for i in range(-8, 2)])
POSITIVE = EVERYWHERE.abs()
FUNCTIONS = {
    "exp": (lambda x: x.exp(), EVERYWHERE),
    "expm1": (lambda x: x.exp() - 1, EVERYWHERE),
    "log": (lambda x: x.ln(), POSITIVE),
    "log2": (lambda x: x.ln() / Decimal(2).ln(), POSITIVE),
    "log1p": (lambda x: (1 + x).ln(), EVERYWHERE.clamp_min(-0.999)),
    "sigmoid": (lambda x: 1 / (1 + (-x).exp()), EVERYWHERE),
    "silu": (lambda x: x / (1 + (-x).exp()), EVERYWHERE),
    "logit": (lambda x: (x / (1 - x)).ln(), POSITIVE / (1 + POSITIVE)),
    "softplus": (lambda x: (1 + x.exp()).ln(), EVERYWHERE),
    "log_sigmoid": (lambda x: -(1 + (-x).exp()).ln(), EVERYWHERE),
    "tanh": (lambda x: 1 - 2 / ((2 * x).exp() + 1), EVERYWHERE),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_accurate(name):
    exact, places = FUNCTIONS[name]
    places = places.clamp(-40, 40)[::11]
    found = getattr(elementary, name)(places).tolist()
    with localcontext(prec=80):
        for x, value in zip(places.tolist(), found, strict=True):
            expected = exact(Decimal(x))
            error, allowed = abs(Decimal(value) - expected), Decimal("2e-14") * abs(expected)
            assert error <= allowed + Decimal("2e-16"), x


def test_functions_are_pytorchs():
    x = EVERYWHERE
    for own, other in (
        (elementary.sin(x), x.sin()), (elementary.cos(x), x.cos()),
        (elementary.power(POSITIVE, 1.5), POSITIVE**1.5), (elementary.power(x, 3), x**3),
        (elementary.power(x, -2), x**-2), (elementary.power(POSITIVE, -0.5), POSITIVE**-0.5),
        (elementary.power(x, 1), x), (elementary.power(0 * x, 1.5), 0 * x),
        (elementary.softplus(x, beta=2), F.softplus(x, beta=2, threshold=1e9)),
    ):  # fmt: skip
        assert torch.allclose(own, other, rtol=1e-13, atol=1e-15)
    x = EVERYWHERE * 20
    for name in ("exp", "expm1", "sigmoid", "tanh", "sin", "cos"):
        own, other = getattr(elementary, name)(x), getattr(torch, name)(x)
        assert torch.allclose(own, other, rtol=1e-13, atol=1e-15)
    # Of many turns: sin has the digits of x.
    far = 1e3 * x
    assert (elementary.sin(far) - far.sin()).abs().max() < 1e-14


def test_powers_of_two_are_exact():
    exponents = torch.arange(-1022, 1024)
    exact = torch.tensor([2.0**i for i in exponents.tolist()], dtype=torch.float64)
    assert torch.equal(elementary.power_of_two(exponents), exact)
    assert torch.equal(elementary.log2(exact), exponents.double())


def test_edges_of_functions():
    x = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, -1.0], dtype=torch.float64)
    assert elementary.log(x).tolist()[:2] == [-torch.inf, torch.inf]
    assert elementary.log(x)[2:].isnan().all()
    for name in ("exp", "sigmoid", "silu", "softplus", "tanh", "sin", "cos", "log1p", "logit"):
        assert getattr(elementary, name)(x)[3].isnan()
