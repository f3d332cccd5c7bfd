"""Variational dequantisation: learned noise, whose bound is one whatever it has learned."""

import math

import pytest
import torch

from mrcnf.flows.solve import Solver
from mrcnf.image import haar
from mrcnf.image.bits import log_prob_of_integers
from mrcnf.image.learned_noise import LearnedNoise
from mrcnf.model.level import Level
from mrcnf.model.settings import FieldConfig, ModelConfig
from mrcnf.training.objectives import flow_matching
from mrcnf.training.times import SHORTEST_TIME

EITHER = pytest.mark.parametrize("pairs", [0, 1], ids=["alone", "in pairs"])


def dequantised(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (x + torch.rand(x.shape, generator=generator, dtype=torch.float64)) / 256


def disturb(learned, size):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in learned.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += size * noise
    return learned


def shaped(pairs, size=0.05):
    return disturb(LearnedNoise(3, 1, pairs).double(), size)


def cells(pairs, n=2):
    generator = torch.Generator().manual_seed(4)
    shape = (n, 1, 8, 8) if pairs else (n, 3, 4, 4)
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64)
    return u, y, torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)


@EITHER
def test_noise_is_uniform_until_it_is_trained(pairs):
    u, y, coarse = cells(pairs)
    bent, log_rise = LearnedNoise(3, 1, pairs).double()(u, y, coarse)
    torch.testing.assert_close(bent, u)
    torch.testing.assert_close(log_rise, torch.zeros(2, dtype=torch.float64))


@EITHER
def test_the_noise_stays_in_its_cell_and_its_density_is_known(pairs):
    learned, (u, y, coarse) = shaped(pairs), cells(pairs)
    bent, log_rise = learned(u, y, coarse)
    assert bent.min() > 0 and bent.max() < 1 and (bent - u).abs().max() > 0.01
    jacobian = torch.autograd.functional.jacobian(lambda v: learned(v, y, coarse)[0], u)
    size = u[0].numel()
    log_det = torch.stack([jacobian[i, :, :, :, i].reshape(size, size).logdet() for i in range(2)])
    torch.testing.assert_close(log_rise, log_det)


def test_the_noise_of_a_pixel_leans_on_that_of_its_neighbours():
    """Of two colours, through all links: the Jacobian's determinant is known, and not diagonal."""
    learned = disturb(LearnedNoise(6, 2, 2).double(), 0.05)
    generator = torch.Generator().manual_seed(4)
    u = torch.rand(1, 2, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(1, 6, 3, 3, generator=generator, dtype=torch.float64)
    coarse = torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64)
    bent, log_rise = learned(u, y, coarse)
    torch.testing.assert_close(haar.means(bent, 1), haar.means(u, 1), rtol=0, atol=1e-15)
    jacobian = torch.autograd.functional.jacobian(lambda v: learned(v, y, coarse)[0], u)
    torch.testing.assert_close(log_rise[0], jacobian.reshape(72, 72).logdet())
    # Corners of the middle patch, by row and column: on the other colour, and across each edge.
    slopes = jacobian[0, :, :, :, 0]
    first, last = slopes[0, 2, 2], slopes[0, 3, 3]
    for slope in (first[1, 2, 2], first[0, 1, 2], first[0, 2, 1], last[0, 4, 3], last[0, 3, 4]):
        assert slope.abs() > 1e-3


def test_noise_of_earlier_versions_has_no_links_and_stays_as_it_was():
    new, old = shaped(1), LearnedNoise(3, 1, 1).double()
    bends = 2 * new.bent
    saved = {
        name: value[:bends] if name.startswith("net.4.") else value
        for name, value in new.state_dict().items()
    }
    old.load_state_dict(saved)
    assert not old.linked and old.bends(*cells(1)[1:]).links == ()
    with torch.no_grad():
        for name, value in new.named_parameters():
            if name.startswith("net.4."):
                value[bends:] = 0
    for found, expected in zip(old(*cells(1)), new(*cells(1)), strict=True):
        torch.testing.assert_close(found, expected)
    old.load_state_dict(new.state_dict())
    assert old.linked


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_edges_of_the_cell_stay_finite(pairs, dtype):
    learned = shaped(pairs, 0.3).to(dtype)
    u, y, coarse = (part.to(dtype) for part in cells(pairs))
    for edge in (0.0, 1 - torch.finfo(dtype).eps):
        bent, log_rise = learned(torch.full_like(u, edge), y, coarse)
        assert bent.min() >= 0 and bent.max() < 1 and log_rise.isfinite().all()


def test_noise_in_pairs_keeps_the_mean_of_every_patch():
    learned, (u, y, coarse) = shaped(1), cells(1)
    bent, _ = learned(u, y, coarse)
    torch.testing.assert_close(haar.means(bent, 1), haar.means(u, 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("pyramid", ["integer", "exact"])
def test_the_probability_is_the_same_under_any_noise(pyramid):
    """P(X) is the mean of p(x)/q(x) over noise of any density q: only its logarithm is bounded.

    That holds for the pyramid's levels together, so the coarser level has to see the same mean.
    """
    torch.manual_seed(0)
    config = ModelConfig((1, 2), channels=1, pyramid=pyramid, dequantisation="variational")
    levels = [Level(config, r, FieldConfig(width=4, depth=1)).double() for r in (1, 2)]
    for level in levels:
        level.units.std.fill_(2 / 256)
    levels[0].units.mean.fill_(120 / 256)
    x = dequantised(torch.tensor([[[[118, 121], [122, 120]]]]).expand(40_000, 1, 2, 2))

    def log_p():
        return sum(level.log_prob(x, solver=Solver(steps=1)).log_prob for level in levels)

    with torch.no_grad():
        plain = log_p()
        for level in levels:
            if level.learned_noise is not None:
                disturb(level.learned_noise, 0.2)
        bent = log_p()
    assert bent.mean() < plain.mean() - 0.05  # such noise is the worse for its shape
    ratio = (bent - plain.exp().mean().log()).exp()
    error = ratio.std() / len(x) ** 0.5
    assert error < 0.03
    assert abs(ratio.mean() - 1) < 4 * error


@pytest.mark.parametrize(
    "pyramid", [pytest.param("integer", marks=pytest.mark.slow), "exact"]
)
def test_shaped_noise_reaches_what_uniform_noise_cannot(pyramid):
    """Pixels in two values whose cells a smooth density cannot fill: a bound falls, not its truth.

    The flow is the identity, so the density is normal; the best noise for it makes the bound
    tight, at log of the cells' probability.
    """
    config = ModelConfig((2,), channels=1, pyramid=pyramid, dequantisation="variational")
    level = Level(config, 2, FieldConfig(width=4, depth=1)).double()
    level.units.std.fill_(0.7 / 256)
    level.units.mean.fill_(128 / 256)
    images = torch.randint(126, 130, (500, 1, 2, 2), generator=torch.Generator().manual_seed(0))

    def bound(seed=1):
        x = dequantised(images, seed=seed)
        log_prob = level.log_prob(x, solver=Solver(steps=1)).log_prob
        return log_prob_of_integers(log_prob, torch.zeros(()), 4).mean()

    normal = torch.distributions.Normal(128.0, torch.tensor(0.7, dtype=torch.float64))
    probability = normal.cdf(images + 1.0) - normal.cdf(images.double())
    truth = probability.log().flatten(1).sum(1).mean()
    before = bound().item()
    optimiser = torch.optim.Adam(level.learned_noise.parameters(), lr=3e-3)
    for step in range(60):
        optimiser.zero_grad()
        (-bound(2 + step)).backward()
        optimiser.step()
    after = bound().item()
    assert before < truth - 0.05
    assert truth - 0.25 * (truth - before) < after < truth + 0.02


@pytest.mark.parametrize("times", ["likelihood", "logit-normal"])
@pytest.mark.parametrize("resolution", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_flow_matching_trains_the_noise_on_the_bound(times, resolution):
    """The gradient by the learned of the loss is that of the evidence lower bound.

    With a field that is exact for normal data the bound is the likelihood, whose gradient
    differentiation through the flow gives as well.
    """
    torch.manual_seed(0)
    sizes = (1, 2)[:resolution]
    config = ModelConfig(sizes, channels=1, dequantisation="variational", whiten=False)
    level = Level(config, resolution, FieldConfig(width=4, depth=1)).double()  # a standard normal's
    level.units.std.fill_((0.7 if level.is_base else 0.4) / 256)
    level.units.mean.fill_(128 / 256 if level.is_base else 0)
    shape, bends = level.learned_noise.net[-1].bias, 2 * level.learned_noise.bent
    with torch.no_grad():  # so that there is something to be learned of links
        shape[bends:] = torch.randn(len(shape) - bends, generator=torch.Generator().manual_seed(2))
    images = torch.randint(126, 130, (240_000 // resolution**2, 1, resolution, resolution))
    found, expected = torch.zeros_like(shape), torch.zeros_like(shape)
    repeats = 1 if times == "likelihood" else 4  # of logit-normal times an eighth trains the noise
    for seed in range(repeats):
        x = dequantised(images, seed)
        loss, _ = flow_matching(level, x, times=times)
        nats = -math.log(SHORTEST_TIME) * loss
        found += torch.autograd.grad(nats, shape)[0] / repeats
        flow = level.log_prob(x, solver=Solver(steps=1))
        likelihood = flow.log_prob.mean() / flow.dims
        expected += torch.autograd.grad(-likelihood, shape)[0] / repeats
    # A link's derivative is its shift's, times up to four.
    torch.testing.assert_close(found[:bends], expected[:bends], rtol=0, atol=0.03)
    torch.testing.assert_close(found[bends:], expected[bends:], rtol=0, atol=0.06)
    assert expected[:bends].abs().max() > 0.05
    assert level.is_base or expected[bends:].abs().max() > 0.2
