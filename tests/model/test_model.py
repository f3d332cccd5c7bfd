"""The model: levels that add up, a true lower bound, and samples that agree with it."""

import math

import pytest
import torch
from models import EXACT, build, images, seeded

from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image import haar
from mrcnf.image.noise import NOISES, dequantise, quantise
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, ModelConfig

SHAPES = [
    ((4,), 1),
    ((4,), 3),
    ((1, 2), 1),
    ((2, 4), 3),
    ((1, 2, 4), 1),
    ((1, 2, 4, 8), 3),
    ((1, 2, 4, 8, 16), 1),
]
EVERY_SHAPE = pytest.mark.parametrize("resolutions, channels", SHAPES)


@EVERY_SHAPE
@pytest.mark.parametrize("kind", NOISES)
def test_everything_a_model_returns(resolutions, channels, kind):
    quick = Solver("midpoint", steps=3)
    model = build(resolutions, channels, solver=quick, dequantisation=kind)
    side, x = resolutions[-1], images(3, model.config)
    fast = {"generator": seeded(), "trace": Trace("hutchinson")}
    bpd = model.bits_per_dim(x, **fast)
    assert bpd.shape == (3,) and bpd.dtype == torch.float64 and bpd.isfinite().all()
    sample = model.sample(2, generator=seeded())
    assert sample.shape == (2, channels, side, side) and sample.dtype == torch.uint8
    for resolution in resolutions:
        small = torch.randint(0, 256, (2, channels, resolution, resolution), dtype=torch.uint8)
        big = model.upscale(small, generator=seeded())
        assert big.shape == (2, channels, side, side) and big.dtype == torch.uint8
    latents = model.encode(x, generator=seeded())
    assert {r: tuple(z.shape[1:]) for r, z in latents.items()} == {
        level.resolution: level.latent_shape(side, side) for level in model
    }
    assert sum(z[0].numel() for z in latents.values()) == x[0].numel()
    frames = model.interpolate(x, x.flip(0), steps=3, generator=seeded())
    assert frames.shape == (3, 3, channels, side, side) and frames.dtype == torch.uint8


@EVERY_SHAPE
def test_levels_add_up(resolutions, channels):
    model = build(resolutions, channels, solver=Solver(steps=2), dequantisation="gaussian")
    x = images(2, model.config)
    fast = {"trace": Trace("hutchinson")}
    parts = model.log_probs_by_level(x, generator=seeded(), **fast)
    assert tuple(parts) == resolutions
    total = sum(part.log_prob for part in parts.values())
    found = model.log_prob(x, generator=seeded(), **fast)
    torch.testing.assert_close(found, total, rtol=1e-12, atol=1e-12)
    bpd = model.bits_per_dim(x, generator=seeded(), **fast)
    torch.testing.assert_close(bpd, -total / (x[0].numel() * math.log(2)))


@pytest.mark.parametrize("nbits", [3, 8])
@pytest.mark.parametrize("kind", NOISES)
def test_the_bound_is_density_over_noise_and_cells(kind, nbits):
    """log p(x) - log q(u) - D·log 2^b, each counted once however many levels there are."""
    model = build((1, 2, 4), solver=Solver(steps=2), dequantisation=kind, nbits=nbits)
    integers = images(3, model.config)
    x, log_q = dequantise(
        integers, nbits=nbits, kind=kind, generator=seeded(), dtype=torch.float64
    )
    density = sum(level.log_prob(x).log_prob for level in model)
    found = model.log_prob(integers, generator=seeded())
    torch.testing.assert_close(found, density - log_q - 16 * nbits * math.log(2))


def test_the_same_seed_gives_the_same_results():
    model = build(solver=Solver(steps=3))
    x = images(2, model.config)
    for call in (
        lambda g: model.log_prob(x, generator=g, trace=Trace("hutchinson")),
        lambda g: model.sample(3, generator=g),
        lambda g: model.upscale(x[:, :, :2, :2], generator=g),
        lambda g: model.interpolate(x, x.flip(0), generator=g),
    ):
        torch.manual_seed(1)
        first = call(seeded(5))
        torch.manual_seed(2)  # a given generator is the only source of randomness
        assert torch.equal(first, call(seeded(5)))
        assert not torch.equal(first, call(seeded(6)))


# -- likelihood -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("base", ["affine", "logit"])
def test_the_density_of_pixels_is_the_latents_times_the_volume(base, kind):
    """From pixels to all latents at once: one Jacobian, no level's arithmetic."""
    solver = Solver("rk4", steps=12)
    model = build((1, 2, 4), base=base, dequantisation=kind, solver=solver)
    x, _ = dequantise(images(1, model.config), kind=kind, dtype=torch.float64)

    def push(x):
        return torch.cat([level.encode(x).flatten() for level in model])

    jacobian = torch.autograd.functional.jacobian(push, x).reshape(16, 16)
    normal = -0.5 * (push(x).square().sum() + 16 * math.log(2 * math.pi))
    expected = normal + torch.linalg.slogdet(jacobian).logabsdet
    found = sum(level.log_prob(x).log_prob for level in model)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("nbits", [1, 5, 8])
@pytest.mark.parametrize("levels", [(4,), (1, 2, 4)])
def test_a_standard_normal_model_costs_what_the_normal_says(levels, nbits):
    """At rest and with unit moments, log p(x) is the normal of all coefficients."""
    config = ModelConfig(levels, channels=1, nbits=nbits)
    model = MultiResolutionFlow(
        [Level(config, r, FieldConfig("paper", 4), Solver(steps=1), EXACT) for r in levels]
    ).double()
    x = images(3, config)
    u, _ = dequantise(x, nbits=nbits, generator=seeded(), dtype=torch.float64)
    parts = []
    for _ in levels[1:]:
        detail, u = haar.split(u)
        parts.append(detail)
    squares = sum(part.square().flatten(1).sum(1) for part in (*parts, u))
    nats = 0.5 * squares + 8 * math.log(2 * math.pi) + 16 * nbits * math.log(2)
    found = model.bits_per_dim(x, generator=seeded())
    torch.testing.assert_close(found, nats / (16 * math.log(2)), rtol=1e-12, atol=0)


def every_binary_image():
    bits = torch.cartesian_prod(*[torch.tensor([0, 255], dtype=torch.uint8)] * 4)
    return bits.reshape(16, 1, 2, 2)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize(
    "base, pyramid",
    [
        ("affine", "exact"),
        pytest.param("logit", "exact", marks=pytest.mark.slow),
        ("affine", "integer"),
    ],
)
def test_bounds_are_below_probabilities_and_samples_agree(base, pyramid, kind):
    """All 16 images of 2×2 bits: P(X) is how often X's cell is sampled, and bounds are below."""
    solver = Solver("rk4", steps=6)
    model = build(
        (1, 2), nbits=1, base=base, pyramid=pyramid, dequantisation=kind, size=0.2, solver=solver
    )
    for level in model:  # crowd the unit cube
        level.units.std.mul_(0.7)
    everything, draws, samples = every_binary_image(), 200, 8_000
    with torch.no_grad():
        bounds = model.log_prob(everything.repeat_interleave(draws, 0), generator=seeded())
        sampled = model._grow(model, samples, (2, 2), None, 1.0, seeded(4), None)[-1]
        # P(X) = ∫ p over X's cell, by uniform points: Gaussian proposals weigh a cell's corners
        # with 1/q, up to e^18, and a finite sum of such weights has no useful error bar.
        u = torch.rand(16 * draws, 1, 2, 2, generator=seeded(5), dtype=torch.float64)
        x = ((everything >> 7).repeat_interleave(draws, 0) + u) / 2
        densities = sum(level.log_prob(x).log_prob for level in model).reshape(16, draws)
    weights = (densities - 4 * math.log(2)).exp()
    probabilities, errors = weights.mean(1), weights.std(1) / math.sqrt(draws)
    inside = ((sampled >= 0) & (sampled < 1)).flatten(1).all(1)
    found = quantise(sampled[inside], nbits=1).flatten(1)
    counts = (found[:, None] == everything.flatten(1)).all(2).sum(0)
    noise = (errors**2 + (counts + 1) / samples**2).sqrt()
    assert ((probabilities - counts / samples).abs() < 4.5 * noise).all()
    total, error = probabilities.sum(), errors.square().sum().sqrt()
    assert 0.2 < total < 1 + 4 * error
    assert (total - inside.double().mean()).abs() < 4 * (error + 0.5 / math.sqrt(samples))
    # The bounds themselves, with three standard errors of their draws to spare.
    bounds = bounds.reshape(16, draws)
    highest = bounds.mean(1) + 3 * bounds.std(1) / math.sqrt(draws)
    assert (bounds.mean(1).exp() < probabilities + 3 * errors).all()
    assert highest.exp().sum() < 1


def test_many_importance_weighted_draws_close_the_bound():
    """Where the model keeps within the unit cube, its 16 probabilities add up to one."""
    model = build((1, 2), nbits=1, size=0.2, solver=Solver("rk4", steps=6))
    for level in model:
        level.units.std.mul_(0.5)
    many = every_binary_image().repeat_interleave(400, 0)
    with torch.no_grad():
        sampled = model._grow(model, 4_000, (2, 2), None, 1.0, seeded(4), None)[-1]
        bounds = model.log_prob(many, generator=seeded()).reshape(16, 400)
    inside = ((sampled >= 0) & (sampled < 1)).flatten(1).all(1).double().mean()
    assert inside > 0.98
    total = bounds.exp().mean(1).sum()
    error = (bounds.exp().std(1) / math.sqrt(400)).square().sum().sqrt()
    assert error < 0.1 and (total - 1).abs() < 3 * error + 0.02
    assert bounds.mean(1).exp().sum() < 0.5  # one draw each would leave that much on the table


def test_draws_are_averaged_or_importance_weighted():
    model = build()
    x = images(2, model.config)
    generator = seeded()
    each = torch.stack([model.log_prob(x, generator=generator) for _ in range(3)])
    mean = model.log_prob(x, generator=seeded(), draws=3)
    torch.testing.assert_close(mean, each.mean(0))
    weighted = model.log_prob(x, generator=seeded(), draws=3, importance=True)
    torch.testing.assert_close(weighted, each.exp().mean(0).log())
    assert (weighted >= mean).all()


# -- samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("resolutions, small", [((2, 4), 2), ((1, 2, 4), 1), ((1, 2, 4), 2)])
def test_upscaled_images_average_back(resolutions, small):
    model = build(resolutions, channels=3)
    for level in model:
        level.units.std.mul_(0.05)  # small details: nothing clips
    x = torch.randint(100, 156, (8, 3, small, small), dtype=torch.uint8)
    big = model.upscale(x, generator=seeded())
    assert big.min() > 0 and big.max() < 255
    back = haar.means(big.double(), int(math.log2(resolutions[-1] // small)))
    # The means are x + 1/2 exactly, and flooring takes from 0 to 1 off every pixel.
    assert (back - x).abs().max() <= 0.5
    assert big.double().std((2, 3)).min() > 1


def test_upscaled_images_average_back_where_details_overshoot():
    model = build((2, 4, 8), channels=3)
    x = torch.randint(0, 256, (8, 3, 2, 2), dtype=torch.uint8)
    big = model.upscale(x, generator=seeded())
    assert big.min() == 0 and big.max() == 255
    assert (haar.means(big.double(), 2) - x).abs().max() <= 0.5


def test_upscaling_the_finest_images_changes_nothing():
    model = build()
    x = images(2, model.config)
    assert torch.equal(model.upscale(x), x)


def test_temperature_zero_is_deterministic():
    model = build((1, 2, 4))
    cold = [model.sample(2, temperature=0.0, generator=seeded(s)) for s in (1, 2)]
    assert torch.equal(*cold) and torch.equal(cold[0][0], cold[0][1])


def test_temperatures_are_by_level():
    model = build((1, 2, 4))
    for level in model:  # keep clear of clipping
        level.units.std.mul_(0.2)
    cold = {1: 1.0, 2: 0.0, 4: 1.0}
    grown = [model._grow(model, 3, (4, 4), None, cold, seeded(s), None) for s in (1, 1, 2)]
    base = grown[0][0]
    latent = torch.zeros(3, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(grown[0][1], model.level(2).generate(latent, base))
    assert torch.equal(grown[0][2], grown[1][2]) and not torch.equal(grown[0][2], grown[2][2])


def test_samples_come_with_those_that_they_grew_from():
    model = build((1, 2, 4))
    drawn = model.sample_levels(3, temperature=0.1, generator=seeded())
    assert {r: tuple(x.shape) for r, x in drawn.items()} == {r: (3, 1, r, r) for r in (1, 2, 4)}
    assert torch.equal(drawn[4], model.sample(3, temperature=0.1, generator=seeded()))
    for fine, coarse in ((4, 2), (2, 1)):
        means = torch.nn.functional.avg_pool2d(drawn[fine].double(), 2)
        assert (means - drawn[coarse]).abs().max() <= 1  # both are rounded


@pytest.mark.parametrize("kind", ["paper", "residual"])
@pytest.mark.parametrize("base", ["affine", "logit"])
@pytest.mark.parametrize("noise", NOISES)
def test_decode_undoes_encode(noise, base, kind):
    solver = Solver("dopri5", steps=0, rtol=1e-6, atol=1e-6)
    field = FieldConfig(kind=kind, width=4, depth=1)
    model = build(
        field=field, base=base, dequantisation=noise, nbits=5, size=0.05, solver=solver
    )
    x = images(4, model.config)
    back = model.decode(model.encode(x, generator=seeded()))
    assert torch.equal(back >> 3, x >> 3)


def test_interpolation_starts_and_ends_at_the_images():
    model = build(solver=Solver("dopri5", steps=0, rtol=1e-6, atol=1e-6), nbits=5)
    first, second = images(2, model.config), images(2, model.config)
    frames = model.interpolate(first, second, steps=4, generator=seeded())
    assert torch.equal(frames[0] >> 3, first >> 3) and torch.equal(frames[-1] >> 3, second >> 3)


@pytest.mark.parametrize("kind", NOISES)
def test_saved_models_give_the_same_likelihoods(kind, tmp_path):
    model, other = (build(dequantisation=kind, size=size) for size in (0.1, 0.2))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = images(2, model.config)
    results = [m.log_prob(x, generator=seeded()) for m in (model, other)]
    assert torch.equal(*results)


# -- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 3, 4, 4), "3 channel.*built for 1"),
        ((1, 1, 8, 7), "8×7.*multiples of 2"),
        ((1, 4, 4), "uint8"),
    ],
)
def test_wrong_images_are_refused(shape, words):
    with pytest.raises(UserError, match=words):
        build().log_prob(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (1, 1, 2, 4), (1, 1, 8, 8), (1, 3, 2, 2)])
def test_wrong_images_are_not_upscaled(shape):
    with pytest.raises(UserError, match=r"size of none of the levels|3 channel"):
        build().upscale(torch.zeros(shape, dtype=torch.uint8))


def test_unknown_and_missing_levels_are_refused():
    model = build()
    with pytest.raises(UserError, match=r"no level 8.*\[2, 4\]"):
        model.level(8)
    with pytest.raises(UserError, match=r"no level 8"):
        Level(model.config, 8)
    with pytest.raises(UserError, match="train the missing"):
        MultiResolutionFlow([model.level(4)])


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"resolutions": (8, 24)}, "twice"),
        ({"resolutions": ()}, "twice"),
        ({"resolutions": (16, 8)}, "twice"),
        ({"nbits": 0}, "nbits"),
        ({"nbits": 9}, "nbits"),
        ({"dequantisation": "none"}, "uniform, gaussian"),
        ({"base": "log"}, "affine, logit"),
    ],
)
def test_wrong_configurations_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        ModelConfig(**wrong)
