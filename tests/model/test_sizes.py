"""Images of any size: the same levels on more positions, and what cannot be so."""

import math

import pytest
import torch
import torch.nn.functional as F
from fields import awake

from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image import haar
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, ModelConfig

SIZES = [(8, 8), (4, 12), (2, 6)]
ATTENTION = FieldConfig(width=4, depth=1, attention=True)
EVERY_SIZE = pytest.mark.parametrize("size", SIZES)


def build(resolutions=(2, 4), channels=1, field=None, steps=6, **settings):
    config = ModelConfig(resolutions=resolutions, channels=channels, **settings)
    field = field or FieldConfig(width=4, depth=1)
    solver = Solver("rk4", steps=steps)
    levels = [Level(config, r, field, solver, Trace("exact")) for r in resolutions]
    model = awake(MultiResolutionFlow(levels), 0.1)
    noise = config.pixel_noise
    x, _ = dequantise(images(64, (config.finest,) * 2, channels), kind=noise, dtype=torch.float64)
    for level in model:
        level.fit_standardisation(x)
    return model


def images(n, size, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, *size), dtype=torch.uint8, generator=generator)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "size, settings",
    [
        ((8, 8), {}),
        ((2, 6), {}),
        ((4, 6), {"dequantisation": "gaussian"}),
        ((4, 6), {"dequantisation": "variational"}),
        ((4, 6), {"base": "logit"}),
        ((4, 8), {"field": ATTENTION}),
    ],
)
def test_the_density_of_another_size_is_the_brute_force_one(size, settings):
    """From pixels to all latents at once: one Jacobian by autograd, no level's arithmetic."""
    model = build(steps=12, **settings)
    x, _ = dequantise(images(1, size), dtype=torch.float64)
    dims = math.prod(size)

    def push(x):
        return torch.cat([level.encode(x).flatten() for level in model])

    jacobian = torch.autograd.functional.jacobian(push, x).reshape(dims, dims)
    normal = -0.5 * (push(x).square().sum() + dims * math.log(2 * math.pi))
    expected = normal + torch.linalg.slogdet(jacobian).logabsdet
    results = [level.log_prob(x) for level in model]
    torch.testing.assert_close(
        sum(result.log_prob for result in results)[0], expected, rtol=0, atol=2e-3
    )
    assert sum(result.dims for result in results) == dims


def test_a_level_of_twice_the_side_solves_what_its_field_says():
    """The same by hand: Haar, units, Runge-Kutta with a dense Jacobian, over the larger grid."""
    level = build(steps=20).level(4)
    x, _ = dequantise(images(1, (8, 8)), dtype=torch.float64)
    detail, coarse = haar.split(x)
    y = torch.einsum("ij,njhw->nihw", level.units.axes, detail - level.units.mean)
    y = y / level.units.std
    known = (coarse - level.coarse_units.mean) / level.coarse_units.std
    (field,) = level.flow

    def rate(t, flat):
        return field(t, flat.reshape(y.shape), known).flatten().detach()

    def trace(t, flat):
        return torch.func.jacrev(lambda v: field(t, v.reshape(y.shape), known).flatten())(
            flat
        ).trace()

    state, total = y.flatten(), torch.zeros((), dtype=torch.float64)
    grid = (torch.arange(21, dtype=torch.float64) / 20) ** 2
    for t, h in zip(grid[:-1], grid.diff(), strict=True):
        k1 = rate(t, state)
        k2 = rate(t + h / 2, state + h / 2 * k1)
        k3 = rate(t + h / 2, state + h / 2 * k2)
        k4 = rate(t + h, state + h * k3)
        traces = [trace(t, state), trace(t + h / 2, state + h / 2 * k1)]
        traces += [trace(t + h / 2, state + h / 2 * k2), trace(t + h, state + h * k3)]
        total = total + h / 6 * (traces[0] + 2 * traces[1] + 2 * traces[2] + traces[3])
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    normal = -0.5 * (state.square().sum() + 48 * math.log(2 * math.pi))
    expected = normal + total - 16 * level.units.std.log().sum()
    found = level.log_prob(x).log_prob[0]
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-9)


@EVERY_SIZE
@pytest.mark.parametrize("pyramid", ["exact", "integer"])
def test_bits_are_per_dimension_of_the_images_that_are_given(size, pyramid):
    model = build(pyramid=pyramid, dequantisation="gaussian")
    x = images(3, size)
    parts = model.log_probs_by_level(x, generator=seeded())
    total = sum(part.log_prob for part in parts.values())
    bpd = model.bits_per_dim(x, generator=seeded())
    torch.testing.assert_close(bpd, -total / (math.prod(size) * math.log(2)))
    noisy, log_q = dequantise(x, kind="gaussian", generator=seeded(), dtype=torch.float64)
    density = sum(level.log_prob(noisy).log_prob for level in model)
    expected = density - log_q - math.prod(size) * math.log(256)
    torch.testing.assert_close(total, expected)


def test_sizes_are_multiples_of_what_the_levels_halve():
    assert build((2, 4)).multiple == 2
    assert build((4, 8, 16)).multiple == 4
    assert build((4, 8), field=FieldConfig(width=4, depth=1, scales=2)).multiple == 4
    assert build((4,), field=FieldConfig(width=4, depth=1, scales=3)).multiple == 4
    mixed = ModelConfig(resolutions=(4, 8), channels=1)
    deep, flat = (FieldConfig(width=4, depth=1, scales=s) for s in (3, 1))
    assert MultiResolutionFlow([Level(mixed, 4, deep), Level(mixed, 8, flat)]).multiple == 8


@EVERY_SIZE
@pytest.mark.parametrize("pyramid", ["exact", "integer"])
def test_samples_have_the_size_asked_for(size, pyramid):
    model = build((1, 2), channels=3, pyramid=pyramid)
    found = model.sample(2, size=size, generator=seeded())
    assert found.shape == (2, 3, *size) and found.dtype == torch.uint8
    again = model.sample(2, size=size, generator=seeded())
    assert torch.equal(found, again)


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (4, 2), (7, 16)])
@pytest.mark.parametrize("pyramid", ["exact", "integer"])
def test_images_of_any_shape_are_upscaled_and_average_back(size, pyramid):
    model = build((1, 2, 4), channels=3, pyramid=pyramid)
    for level in model:
        level.units.std.mul_(0.05)  # small details: nothing clips
    x = images(2, size, 3) // 2 + 64
    for level, factor in ((1, 4), (2, 2)):
        big = model.upscale(x, level=level, generator=seeded())
        assert big.shape == (2, 3, factor * size[0], factor * size[1])
        if pyramid == "exact":
            means = F.avg_pool2d(big.double(), factor)
            assert (means - x).abs().max() <= 0.5
        else:
            lifted = big.int()
            for _ in range(int(math.log2(factor))):
                _, lifted = haar.lift(lifted)
            assert torch.equal(lifted, x.int())
    assert torch.equal(model.upscale(x, level=4), x)


def test_upscaling_pads_what_a_network_cannot_halve_and_crops_the_result():
    model = build((2, 4), field=FieldConfig(width=4, depth=1, scales=2))
    x = images(1, (3, 5))
    big = model.upscale(x, level=2, generator=seeded())
    assert big.shape == (1, 1, 6, 10)
    padded = F.pad(x.double(), (0, 1, 0, 1), mode="replicate").to(torch.uint8)
    whole = model.upscale(padded, level=2, generator=seeded())
    assert torch.equal(big, whole[..., :6, :10])


def test_a_padded_image_costs_its_padding():
    model = build((2, 4), channels=3)
    x = images(2, (3, 5), 3)
    with pytest.raises(UserError, match=r"3×5.*multiples of 2.*pad=True"):
        model.bits_per_dim(x)
    padded = F.pad(x.double(), (0, 1, 0, 1), mode="replicate").to(torch.uint8)
    found = model.bits_per_dim(x, pad=True, generator=seeded())
    whole = model.bits_per_dim(padded, generator=seeded())
    torch.testing.assert_close(found, whole * (4 * 6) / (3 * 5))
    fits = images(2, (4, 6), 3)
    bits = [model.bits_per_dim(fits, pad=pad, generator=seeded()) for pad in (True, False)]
    assert torch.equal(*bits)


def test_fields_that_know_their_size_serve_larger_images_in_tiles_of_it():
    model = build((2, 4), channels=3, field=ATTENTION)
    assert model.multiple == 4
    x, _ = dequantise(images(2, (8, 12), 3), dtype=torch.float64)
    parts = [x[..., i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4, 8)]
    for level in model:
        whole = level.log_prob(x, regularise=True)
        tiles = [level.log_prob(part, regularise=True) for part in parts]
        torch.testing.assert_close(whole.log_prob, sum(tile.log_prob for tile in tiles))
        assert whole.dims == sum(tile.dims for tile in tiles)
        for name in ("kinetic", "frobenius"):
            mean = sum(getattr(tile, name) for tile in tiles) / len(tiles)
            torch.testing.assert_close(getattr(whole, name), mean)
    back = model.decode(model.encode(images(2, (8, 12), 3), generator=seeded()))
    assert back.shape == (2, 3, 8, 12)
    assert model.sample(1, size=(4, 8), generator=seeded()).shape == (1, 3, 4, 8)
    big = model.upscale(images(1, (3, 5), 3), level=2, generator=seeded())
    assert big.shape == (1, 3, 6, 10)
    with pytest.raises(UserError, match="multiples of 4"):
        model.bits_per_dim(images(1, (6, 4), 3))


@pytest.mark.parametrize("size", [(3, 4), (0, 4), (-2, 4)])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(UserError, match="multiples of 2"):
        build().sample(1, size=size)


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -1.0, {4: -1.0}])
def test_impossible_temperatures_are_refused(temperature):
    model = build()
    with pytest.raises(UserError, match="temperature must be 0 or more, and finite"):
        model.sample(1, temperature=temperature)
    with pytest.raises(UserError, match="temperature"):
        model.upscale(images(1, (2, 2)), temperature=temperature)


def test_images_of_no_levels_size_need_a_level_to_be_upscaled():
    model = build()
    with pytest.raises(UserError, match=r"3×5.*\[2, 4\].*level=2"):
        model.upscale(images(1, (3, 5)))
    with pytest.raises(UserError, match="no level 8"):
        model.upscale(images(1, (2, 2)), level=8)


def test_levels_refuse_coefficients_of_other_channels():
    """One channel would be taken for all three, and three for one."""
    for channels, other in ((3, 1), (1, 3)):
        for level in build((2, 4), channels=channels):
            x = torch.rand(2, other, 4, 4, dtype=torch.float64)
            with pytest.raises(UserError, match="channel"):
                level.log_prob(x)


def test_a_level_of_nought_is_no_level():
    with pytest.raises(UserError, match="no level 0"):
        build().upscale(images(1, (4, 8)), level=0)


def test_temperatures_are_of_levels_that_there_are():
    with pytest.raises(UserError, match="no level 16"):
        build().sample(1, temperature={16: 0.5})


@pytest.mark.parametrize("other", [(2, (8, 8)), (1, (4, 4))])
def test_images_that_differ_are_not_interpolated(other):
    with pytest.raises(UserError, match="must be alike"):
        build().interpolate(images(2, (4, 4)), images(*other))


def test_no_images_have_no_likelihoods():
    assert build().bits_per_dim(images(0, (4, 4))).shape == (0,)
