"""The units of the flows: volumes, moments, and what the fields are told of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import build, correlated, images

from mrcnf.flows.tangents import mix
from mrcnf.image.noise import NOISES, dequantise
from mrcnf.model.settings import FieldConfig


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("base", ["affine", "logit"])
@pytest.mark.parametrize("resolution", [2, 4])
def test_standardisation_reports_its_volume_and_inverts(resolution, base, kind):
    model = build(base=base, dequantisation=kind, channels=3)
    level = model.level(resolution)
    level.fit_standardisation(correlated(50, 4))
    values = 0.1 + 0.8 * torch.rand(2, *level.latent_shape(4, 4), dtype=torch.float64)
    y, log_det = level.standardise(values)
    torch.testing.assert_close(level.units.invert(y), values, rtol=0, atol=1e-12)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, level=level: level.standardise(v[None])[0].flatten(), values[i]
        )
        volume = torch.linalg.slogdet(jacobian.reshape(values[0].numel(), -1)).logabsdet
        torch.testing.assert_close(log_det[i], volume, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("resolution", [2, 4, 8])
def test_fitted_coefficients_are_standardised(resolution, whiten):
    model = build((2, 4, 8), channels=3, whiten=whiten)
    x = correlated(200, 8)
    level = model.level(resolution)
    level.fit_standardisation(x)
    values, coarse = level.coefficients(x)
    y = level.standardise(values)[0]
    covariance = torch.cov(y.movedim(1, 0).flatten(1))
    unit = torch.eye(len(covariance), dtype=torch.float64)
    assert torch.allclose(covariance, unit, atol=1e-10) == whiten
    torch.testing.assert_close(level.units.axes @ level.units.axes.T, unit, rtol=0, atol=1e-12)
    for part in (level.standardise(values)[0], level.condition(coarse)):
        if part is not None:
            torch.testing.assert_close(part.mean((0, 2, 3)), part.new_zeros(part.shape[1]))
            torch.testing.assert_close(part.std((0, 2, 3)), part.new_ones(part.shape[1]))


def test_constant_channels_do_not_divide_by_zero():
    model = build()
    for level in model:
        level.fit_standardisation(torch.full((5, 1, 4, 4), 0.5, dtype=torch.float64))
    assert model.bits_per_dim(images(2, model.config)).isfinite().all()


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("resolution", [2, 4, 8])
def test_gaussian_levels_know_the_noise_of_every_channel(resolution, whiten):
    model = build((2, 4, 8), channels=3, dequantisation="gaussian", whiten=whiten)
    level = model.level(resolution)
    x = (correlated(400, 8) * 255).to(torch.uint8)
    noisy, _ = dequantise(x, kind="gaussian", dtype=torch.float64)
    level.fit_standardisation(noisy)
    clean = (x.double() + 0.5) / 256
    flow_units = [level.standardise(level.coefficients(v)[0])[0] for v in (noisy, clean)]
    spread = (flow_units[0] - flow_units[1]).std((0, 2, 3))
    noise = level.noise.flatten()
    assert noise.min() > 0 and noise.max() < 0.1
    # Truncation at three standard deviations takes 1.4% off.
    torch.testing.assert_close(spread / noise, torch.full_like(noise, 0.987), rtol=0, atol=0.04)


def test_a_logit_takes_its_noise_for_data():
    model = build(base="logit", dequantisation="gaussian")
    for level in model:
        level.fit_standardisation(dequantise(images(9, model.config))[0].double())
    assert model.level(2).noise.max() == 0 < model.level(4).noise.min()


def see_lattice(resolutions, resolution, pyramid="exact"):
    """The integers that a level's field sees in dequantised images, and those images' level."""
    field = FieldConfig(width=4, depth=1, lattice=True)
    model = build(resolutions, channels=3, field=field, pyramid=pyramid)
    level = model.level(resolution)
    x = (torch.randint(0, 256, (9, 3, 8, 8)).double() + 0.5) / 256
    level.fit_standardisation(x)
    y, condition, _ = level.prepare(x)
    lattice = level.flow.fields[0].lattice
    if lattice is None:
        return None, x, level
    phase = mix(lattice.of_y, y) + lattice.offset
    if condition is not None:
        phase = phase + mix(lattice.of_coarse, condition)
    return phase / (2 * math.pi), x, level


@pytest.mark.parametrize("resolutions", [(8,), (4, 8)])
def test_fields_are_told_where_the_pixels_are(resolutions):
    found, x, _ = see_lattice(resolutions, 8)
    expected = x * 256 - 0.5
    if len(resolutions) > 1:
        expected = F.pixel_unshuffle(expected, 2)
    assert sorted(found.flatten().round().tolist()) == sorted(expected.flatten().tolist())
    torch.testing.assert_close(found, found.round(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("resolution", [2, 4, 8])
def test_fields_of_integers_are_told_where_those_are(resolution):
    found, x, level = see_lattice((2, 4, 8), resolution, "integer")
    values, _ = level.coefficients(x)
    torch.testing.assert_close(found, values * 256 - 0.5, rtol=0, atol=1e-8)
    torch.testing.assert_close(found, found.round(), rtol=0, atol=1e-8)


def test_means_have_no_lattice_to_see():
    assert see_lattice((2, 4, 8), 4)[0] is None
