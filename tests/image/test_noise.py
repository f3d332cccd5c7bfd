"""Dequantisation stays in the cell, has the density it reports, and costs what it must."""

import math

import pytest
import torch

from mrcnf.errors import UserError
from mrcnf.image.bits import bits_per_dim, log_prob_of_integers
from mrcnf.image.noise import GAUSSIAN_STD, NOISES, check_images, dequantise, quantise

EVERY_VALUE = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
STD = GAUSSIAN_STD


def truncated_gaussian(u):
    """Density on the unit cell, from its definition."""
    inside = math.erf(0.5 / STD / math.sqrt(2))
    return torch.exp(-0.5 * ((u - 0.5) / STD) ** 2) / (STD * math.sqrt(2 * math.pi) * inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("nbits", range(1, 9))
def test_noise_stays_in_its_cell(nbits, kind, dtype):
    images = EVERY_VALUE.expand(64, -1, -1, -1)
    x, log_q = dequantise(images, nbits=nbits, kind=kind, dtype=dtype)
    assert x.dtype == log_q.dtype == dtype and log_q.shape == (64,)
    assert x.min() >= 0 and x.max() < 1
    kept = quantise(x, nbits=nbits) >> (8 - nbits)
    assert torch.equal(kept, images >> (8 - nbits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("draw", [0.0, 1.0])
def test_the_most_extreme_noise_stays_in_its_cell(kind, dtype, draw, monkeypatch):
    # 1 itself is never drawn, but adding 255 to the number before it rounds to 256.
    draw = torch.nextafter(torch.tensor(draw, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    monkeypatch.setattr(torch, "rand", lambda shape, **_: draw.expand(shape).clone())
    for nbits in range(1, 9):
        x, log_q = dequantise(EVERY_VALUE, nbits=nbits, kind=kind, dtype=dtype)
        kept = quantise(x, nbits=nbits) >> (8 - nbits)
        assert torch.equal(kept, EVERY_VALUE >> (8 - nbits))
        assert log_q.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nbits", range(1, 9))
def test_quantised_images_reach_black_and_white(nbits, dtype):
    x = torch.tensor([-0.5, 0.0, 0.9999, 1.0, 7.0], dtype=dtype)
    assert quantise(x, nbits=nbits).tolist() == [0, 0, 255, 255, 255]


def noise(kind, count=200_000):
    """Noise in the unit cell, one pixel to an image, with its log-density."""
    images = torch.full((count, 1, 1, 1), 77, dtype=torch.uint8)
    x, log_q = dequantise(images, kind=kind, dtype=torch.float64)
    return x.flatten() * 256 - 77, log_q


def test_the_gaussian_density_integrates_to_one():
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert abs(torch.trapezoid(truncated_gaussian(u), u) - 1) < 1e-6


def test_log_q_is_the_density_of_the_noise():
    u, log_q = noise("gaussian")
    torch.testing.assert_close(log_q, truncated_gaussian(u).log(), rtol=0, atol=1e-9)
    u, log_q = noise("uniform")
    assert torch.equal(log_q, torch.zeros_like(u))


def test_log_q_adds_over_pixels():
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    x, log_q = dequantise(images, kind="gaussian", dtype=torch.float64)
    u = x * 256 - images
    expected = truncated_gaussian(u).log().flatten(1).sum(1)
    torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", NOISES)
def test_the_noise_is_drawn_from_its_density(kind):
    u, _ = noise(kind)
    # Kolmogorov–Smirnov: √n·sup|F_n - F| exceeds 2 with probability 7e-4.
    ordered = u.sort().values
    if kind == "gaussian":
        edge = math.erf(0.5 / STD / math.sqrt(2))
        expected = (torch.erf((ordered - 0.5) / STD / math.sqrt(2)) / edge + 1) / 2
    else:
        expected = ordered
    steps = torch.arange(1, len(u) + 1) / len(u)
    assert (steps - expected).abs().max() * math.sqrt(len(u)) < 2


def test_moments_of_the_truncated_gaussian():
    u, _ = noise("gaussian")
    a = 0.5 / STD
    density = math.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    variance = STD**2 * (1 - 2 * a * density / math.erf(a / math.sqrt(2)))
    error = math.sqrt(variance / len(u))
    assert abs(u.mean() - 0.5) < 4 * error
    # The relative error of a Gaussian's variance is √(2/n); truncation makes it less.
    assert abs(u.var() / variance - 1) < 4 * math.sqrt(2 / len(u))


@pytest.mark.parametrize("nbits", range(1, 9))
def test_uniform_pixels_under_a_uniform_model_cost_all_their_bits(nbits):
    images = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8)
    _, log_q = dequantise(images, nbits=nbits, dtype=torch.float64)
    log_prob = log_prob_of_integers(torch.zeros_like(log_q), log_q, 48, nbits)
    bpd = bits_per_dim(log_prob, 48)
    torch.testing.assert_close(bpd, torch.full_like(bpd, nbits), rtol=1e-14, atol=0)


def test_the_wrong_noise_costs_its_relative_entropy():
    # Under a uniform model, Gaussian noise costs KL(q ‖ uniform) = E log q bits more.
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    q = truncated_gaussian(u)
    expected = 8 + torch.trapezoid(q * q.log(), u) / math.log(2)
    _, log_q = noise("gaussian")
    bpd = bits_per_dim(log_prob_of_integers(torch.zeros_like(log_q), log_q, 1), 1)
    assert abs(bpd.mean() - expected) < 4 * bpd.std() / math.sqrt(len(bpd))
    assert expected > 8.5


def test_the_same_seed_draws_the_same_noise():
    draws = [
        dequantise(EVERY_VALUE, kind="gaussian", generator=torch.Generator().manual_seed(s))
        for s in (3, 3, 4)
    ]
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 1, 2, 2),
        torch.zeros(1, 1, 2, 2, dtype=torch.int64),
        torch.zeros(1, 2, 2, dtype=torch.uint8),
    ],
)
def test_other_than_byte_images_are_refused(images):
    with pytest.raises(UserError, match="uint8"):
        dequantise(images)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match=r"'gauss'.*uniform, gaussian"):
        dequantise(EVERY_VALUE, kind="gauss")


def test_the_wrong_number_of_channels_is_refused():
    with pytest.raises(UserError, match=r"1 channel.*built for 3"):
        check_images(EVERY_VALUE, 3)
