"""Objectives: likelihood and its gradient, and flow matching on problems with known answers."""

import math

import pytest
import torch
from fields import LinearField, awake, matrix
from torch import nn

from mrcnf.flows import paths
from mrcnf.flows.paths import PATHS
from mrcnf.flows.residual_field import ResidualField
from mrcnf.flows.solve import Solver
from mrcnf.flows.tangents import Dual
from mrcnf.flows.trace import Trace
from mrcnf.flows.velocity import Field
from mrcnf.image import haar
from mrcnf.image.bits import bits_per_dim
from mrcnf.image.noise import NOISES, dequantise
from mrcnf.model.level import Level
from mrcnf.model.settings import FieldConfig, ModelConfig
from mrcnf.training.objectives import augment, flow_matching, likelihood
from mrcnf.training.times import SHORTEST_TIME

EXACT = Trace("exact")
RK4 = Solver("rk4", steps=8)


def level(resolution=2, solver=RK4, path="straight", **model):
    torch.manual_seed(0)
    config = ModelConfig(resolutions=(1, 2), channels=1, **model)
    field = FieldConfig("paper", width=8, path=path)
    return Level(config, resolution, field, solver, EXACT).double()


def dequantised(n=4, **kind):
    x = torch.randint(0, 256, (n, 1, 2, 2), dtype=torch.uint8)
    return dequantise(x, dtype=torch.float64, **kind)


# -- maximum likelihood -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", NOISES)
def test_the_parts_of_the_loss(kind):
    part = awake(level(dequantisation=kind))
    x, log_q = dequantised(kind=kind)
    settings = {"solver": RK4, "trace": EXACT}
    loss, found = likelihood(part, x, log_q, kinetic=0.3, frobenius=0.2, **settings)
    flow = part.log_prob(x, regularise=True)
    bpd = (8 * 3 * math.log(2) + 0.75 * log_q - flow.log_prob).mean() / (3 * math.log(2))
    torch.testing.assert_close(found["bpd"], bpd.detach())
    expected = bpd + 0.3 * flow.kinetic.mean() + 0.2 * flow.frobenius.mean()
    torch.testing.assert_close(loss, expected)
    assert not any(value.requires_grad for value in found.values())
    plain, parts = likelihood(part, x, log_q, kinetic=0, frobenius=0, **settings)
    torch.testing.assert_close(plain.detach(), parts["bpd"])


@pytest.mark.parametrize("resolution", [1, 2])
@pytest.mark.parametrize("kind", NOISES)
def test_crops_cost_what_they_cost_within_the_image(kind, resolution):
    """At rest positions are independent, so the bits of an image are the mean of its quarters'."""
    part = level(resolution, dequantisation=kind)
    part.units.std.fill_(0.3)
    x, log_q = dequantise(
        torch.randint(0, 256, (4, 1, 4, 4), dtype=torch.uint8), kind=kind, dtype=torch.float64
    )
    settings = {"solver": RK4, "trace": EXACT, "kinetic": 0, "frobenius": 0}
    whole, _ = likelihood(part, x, log_q, **settings)
    quarters = [x[..., i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2)]
    found = [likelihood(part, v, log_q / 4, **settings)[0] for v in quarters]
    torch.testing.assert_close(torch.stack(found).mean(), whole)


def test_crops_weigh_learned_noise_as_the_image_does():
    part = level(dequantisation="variational")
    part.units.std.fill_(0.3)
    x, _ = dequantised(8)
    x = x.repeat(1, 1, 2, 2)
    found = [flow_matching(part, v)[1]["log_det"] for v in (x, x[..., :2, :2])]
    torch.testing.assert_close(found[0], -torch.tensor(0.3, dtype=torch.float64).log())
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("trace", [EXACT, Trace("hutchinson", 2)])
def test_the_gradient_of_the_likelihood(trace):
    part = awake(level())
    x, log_q = dequantised()
    parameters = list(part.flow.parameters())

    def loss():
        generator = torch.Generator().manual_seed(1)
        return likelihood(part, x, log_q, solver=RK4, trace=trace, generator=generator)[0]

    gradients = torch.autograd.grad(loss(), parameters)
    directions = [torch.randn_like(p) for p in parameters]
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, direction in zip(parameters, directions, strict=True):
                p += step * direction
            ends.append(loss().item())
    along = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    assert along == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_steer_moves_the_end_within_its_range(monkeypatch):
    part, seen = level(), []
    original = part.log_prob
    monkeypatch.setattr(
        part, "log_prob", lambda *a, end, **k: (seen.append(end), original(*a, end=end, **k))[1]
    )
    x, log_q = dequantised()
    fast = {"solver": Solver(steps=1), "trace": EXACT, "kinetic": 0, "frobenius": 0}
    for _ in range(200):
        likelihood(part, x, log_q, steer=0.25, **fast)
    assert 0.75 <= min(seen) < 0.78 and 1.22 < max(seen) <= 1.25
    seen.clear()
    likelihood(part, x, log_q, **fast)
    assert seen == [1.0]


def test_steer_integrates_to_the_moved_end():
    part = level()
    a = matrix(3)
    part.flow.fields[0] = LinearField(a)
    x, log_q = dequantised()
    generator = torch.Generator().manual_seed(2)
    settings = {"solver": Solver("rk4", steps=30), "trace": EXACT}
    _, found = likelihood(part, x, log_q, steer=0.5, generator=generator, **settings)
    end = 1 + 0.5 * (2 * torch.rand((), generator=generator.manual_seed(2)).item() - 1)
    assert found["frobenius"].item() == pytest.approx(end * a.square().sum().item() / 3, rel=1e-9)


def test_likelihood_times_weigh_errors_as_the_evidence_bound_does():
    """An error of 1 at times above 1/2 only: ∫ (1-t)/t dt over them, per unit of log t."""
    part = level()
    y0, _ = part.standardise(part.coefficients(x := dequantised(4096)[0])[0])

    def half_wrong(t, y):
        at = t[:, None, None, None]
        return (y - y0) / at + (at > 0.5)

    part.flow.fields[0] = Recording(half_wrong)
    loss, _ = flow_matching(part, x, times="likelihood")
    expected = (math.log(2) - 0.5) / -math.log(SHORTEST_TIME)
    assert float(loss) == pytest.approx(expected, rel=0.01)


# -- flow matching ----------------------------------------------------------------------------


class Recording(nn.Module):
    """Stands in for a field: answers with a given map and remembers what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.seen = answer, []

    def forward(self, t, y, coarse=None):
        self.seen.append((t, y, coarse))
        return self.answer(t, y)


def test_the_regression_is_on_noise_minus_data():
    part = level()
    y0, _ = part.standardise(part.coefficients(x := dequantised(64)[0])[0])

    def oracle(t, y):  # on the path, z - y = (y_t - y)/t
        return (y - y0) / t[:, None, None, None]

    part.flow.fields[0] = field = Recording(oracle)
    loss, _ = flow_matching(part, x)
    assert loss < 1e-20
    ((_, _, coarse),) = field.seen
    torch.testing.assert_close(coarse, part.condition(part.coefficients(x)[1]))


@pytest.mark.parametrize("path", PATHS)
def test_noisy_data_are_matched_from_clean_images_given_noisy_coarse_ones(path):
    part = level(dequantisation="gaussian", path=path)
    images = torch.randint(0, 256, (64, 1, 2, 2), dtype=torch.uint8)
    x, _ = dequantise(images, kind="gaussian", dtype=torch.float64)
    part.fit_standardisation(x)
    part.noise.copy_(torch.tensor([0.1, 0.2, 0.3])[:, None, None])
    clean = (images.double() + 0.5) / 256
    y0 = part.standardise(part.coefficients(clean)[0])[0]

    def oracle(t, y):
        """Knows y, and solves for z."""
        at = paths.at(path, t[:, None, None, None], part.noise)
        return at.velocity(y0, (y - at.alpha * y0) / at.beta)

    part.flow.fields[0] = field = Recording(oracle)
    loss, _ = flow_matching(part, x, clean=clean)
    ((_, _, coarse),) = field.seen
    assert loss < 1e-20
    torch.testing.assert_close(coarse, part.condition(part.coefficients(x)[1]))


class Regression(LinearField):
    """The conditional Gaussian's own field, of three unknown numbers: y | coarse ~ N(a·coarse, s²).

    The best velocity is linear in y and coarse at each t; here its form is given and its
    numbers are learned.
    """

    def __init__(self, path="straight", noise=0.0):
        super().__init__(torch.zeros(1, 1))
        self.path, self.noise = path, noise
        self.slope = nn.Parameter(torch.zeros(3, 1, 1, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def run(self, t, y, context):
        at = paths.at(self.path, t.reshape(-1, 1, 1, 1), self.noise)
        variance = (2 * self.log_std).exp()
        mean = self.slope * context
        spread = at.alpha**2 * variance + at.beta**2
        gain = (at.alpha * at.alpha_rate * variance + at.beta * at.beta_rate) / spread
        # E[dy_t/dt | y_t] = α'·mean + gain·(y_t - α·mean)
        return y.scale(gain).shift((at.alpha_rate - gain * at.alpha) * mean)


SLOPES = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)[:, None, None]


def linear_gaussian(n, noise, generator):
    """Images whose details are SLOPES·coarse + noise·ε, and their log-density given coarse."""
    coarse = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    error = torch.randn(n, 3, 1, 1, generator=generator, dtype=torch.float64)
    log_prob = -0.5 * error.square().flatten(1).sum(1) - 3 * math.log(
        noise * math.sqrt(2 * math.pi)
    )
    return haar.merge(SLOPES * coarse + noise * error, coarse), log_prob


def fit(part, draw, iterations=300, rate=0.05, times="logit-normal"):
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(part.flow.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for _ in range(iterations):
        x, clean = draw(generator)
        loss, _ = flow_matching(part, x, clean=clean, times=times, generator=generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


SOLVE = Solver("rk4", steps=40)


@pytest.mark.parametrize("path", PATHS)
def test_flow_matching_finds_a_conditional_gaussian(path):
    part = level(path=path)
    part.flow.fields[0] = Regression(path)
    fit(part, lambda g: (linear_gaussian(256, 0.4, g)[0], None))
    x, truth = linear_gaussian(2000, 0.4, torch.Generator().manual_seed(9))
    with torch.no_grad():
        found = part.log_prob(x, solver=SOLVE).log_prob
    # The excess is a relative entropy: not below zero, and small once the fit has found it.
    assert -2e-3 < (truth - found).mean() < 2e-2
    assert (truth - found).abs().max() < 0.5


def test_a_network_learns_a_conditional_gaussian():
    """The same with a residual field, which is not told the form of the answer."""
    part = level()
    part.flow.fields[0] = ResidualField(3, 1, width=16, depth=1).double()
    fit(part, lambda g: (linear_gaussian(256, 0.4, g)[0], None), iterations=250)
    x, truth = linear_gaussian(1000, 0.4, torch.Generator().manual_seed(9))
    with torch.no_grad():
        found = part.log_prob(x, solver=Solver(steps=30)).log_prob
        # What not looking at the coarse image would cost at least: log √(1 + slope²/noise²).
        blind = (1 + SLOPES.square() / 0.4**2).log().sum() / 2
    assert blind > 1.5 and -0.05 < (truth - found).mean() < 0.3


@pytest.mark.parametrize("path", PATHS)
def test_flow_matching_finds_the_density_of_noisy_data(path):
    """Gaussian details and Gaussian noise: the density of their sum is known."""
    part = level(dequantisation="gaussian", path=path)
    noise, sigma = 0.5, 0.25
    part.noise.fill_(sigma)
    part.flow.fields[0] = Regression(path, sigma)

    def draw(generator, n=256):
        clean, _ = linear_gaussian(n, noise, generator)
        detail, coarse = haar.split(clean)
        extra = sigma * torch.randn(detail.shape, generator=generator, dtype=torch.float64)
        return haar.merge(detail + extra, coarse), clean

    fit(part, draw)
    x, _ = draw(torch.Generator().manual_seed(9), 2000)
    values, coarse = part.coefficients(x)
    total = math.hypot(noise, sigma)
    normal = torch.distributions.Normal(SLOPES * coarse, total)
    truth = normal.log_prob(values).flatten(1).sum(1)
    with torch.no_grad():
        found = part.log_prob(x, solver=SOLVE).log_prob
    assert -2e-3 < (truth - found).mean() < 2e-2


# -- the lattice of integers ------------------------------------------------------------------


def pixel_level(lattice=False):
    """A level of single pixels that come with Gaussian noise."""
    torch.manual_seed(0)
    config = ModelConfig(resolutions=(1,), channels=1, dequantisation="gaussian")
    field = FieldConfig(width=16, depth=1, lattice=lattice)
    part = Level(config, 1, field, Solver("midpoint", steps=100, spacing=3.0), EXACT).double()
    part.fit_standardisation(single_pixels(4096, seeded(5))[1])
    return part


def single_pixels(n, generator):
    images = torch.randint(0, 256, (n, 1, 1, 1), dtype=torch.uint8, generator=generator)
    return images, *dequantise(
        images, kind="gaussian", dtype=torch.float64, generator=generator
    )


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def bits(part):
    _, x, log_q = single_pixels(2000, seeded(6))
    with torch.no_grad():
        bound = part.bound(part.log_prob(x), x, log_q)
    return bits_per_dim(bound, 1).mean()


class Comb(Field):
    """The best velocity for 256 equally likely pixels: from the posterior over all of them."""

    def __init__(self, part):
        super().__init__()
        values = ((torch.arange(256).double() + 0.5) / 256).reshape(256, 1, 1, 1)
        self.points, self.noise = part.standardise(values)[0].flatten(), part.noise

    def run(self, t, y, context):
        def velocity(at):
            path = paths.at("straight", t, self.noise)
            distance = (at - path.alpha * self.points) / path.beta
            clean = ((-distance.square() / 2).softmax(-1) * self.points).sum(-1, keepdim=True)
            return path.velocity(clean, (at - path.alpha * clean) / path.beta)

        if y.tangents is None:
            return Dual(velocity(y.value), None)
        value, pushed = torch.func.jvp(velocity, (y.value,), (y.tangents[0],))
        return Dual(value, pushed[None])


def test_the_bound_on_the_lattice_is_tight_for_the_best_field():
    """256 equally likely values cost 8 bits; noise that is cut off at 3 σ costs 0.004 more."""
    part = pixel_level()
    part.flow.fields[0] = Comb(part)
    assert bits(part) == pytest.approx(8 - math.log2(math.erf(3 / math.sqrt(2))), abs=0.02)


@pytest.mark.slow
def test_a_field_must_see_the_lattice_to_be_tight_on_it():
    """What it misses otherwise is the noise's missing entropy, 0.54 bits."""
    found = {}
    for lattice in (True, False):
        part = pixel_level(lattice)

        def draw(generator):
            images, x, _ = single_pixels(256, generator)
            return x, (images.double() + 0.5) / 256

        fit(part, draw, rate=0.01, times="mixed")  # the lattice shows at early times
        found[lattice] = bits(part)
    assert 8 < found[True] < 8.2 and 8.5 < found[False] < 8.8, found


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("crop", [0, 4, 8])
def test_crops_are_windows_of_the_images(flip, crop):
    pixels = torch.arange(6 * 64, dtype=torch.int32).reshape(6, 1, 8, 8)
    seen = set()
    for seed in range(20):
        cut = augment(pixels, flip, crop, torch.Generator().manual_seed(seed))
        side = crop or 8
        assert cut.shape == (6, 1, side, side)
        for original, image in zip(pixels, cut, strict=True):
            corner = int(image.min()) - int(original.min())
            top, left = divmod(corner, 8)
            window = original[:, top : top + side, left : left + side]
            mirrored = not torch.equal(image, window)
            assert not mirrored or (flip and torch.equal(image, window.flip(-1)))
            seen.add((top, left, mirrored))
    assert {mirrored for *_, mirrored in seen} == ({True, False} if flip else {False})
    places = {place[:2] for place in seen}
    assert len(places) > 5 if crop == 4 else places == {(0, 0)}
