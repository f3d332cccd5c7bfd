"""Paths from data to noise: their ends, their rates, their weights."""

import pytest
import torch

from mrcnf.flows import paths
from mrcnf.flows.paths import PATHS

EVERY_PATH = pytest.mark.parametrize("kind", PATHS)
EVERY_NOISE = pytest.mark.parametrize("noise", [0.0, 0.1])
TIMES = torch.linspace(0, 1, 11, dtype=torch.float64)


def at(kind, t, noise):
    return paths.at(kind, t, torch.tensor(noise, dtype=torch.float64))


@EVERY_PATH
@EVERY_NOISE
def test_the_ends_are_the_noisy_data_and_pure_noise(kind, noise):
    path = at(kind, TIMES, noise)
    for found, start, end in ((path.alpha, 1, 0), (path.beta, noise, 1)):
        assert found[0] == pytest.approx(start, abs=1e-15)
        assert found[-1] == pytest.approx(end, abs=1e-15)


@EVERY_PATH
@EVERY_NOISE
def test_rates_are_derivatives(kind, noise):
    _, (alpha_rate, beta_rate) = torch.func.jvp(
        lambda t: tuple(at(kind, t, noise)[:2]), (TIMES,), (torch.ones_like(TIMES),)
    )
    path = at(kind, TIMES, noise)
    torch.testing.assert_close(path.alpha_rate, alpha_rate)
    torch.testing.assert_close(path.beta_rate, beta_rate)


def test_the_variance_is_kept():
    path = at("variance-preserving", TIMES, 0.0)
    torch.testing.assert_close(path.alpha**2 + path.beta**2, torch.ones_like(TIMES))


@EVERY_PATH
@EVERY_NOISE
def test_errors_weigh_half_the_fall_of_the_signal_to_noise_ratio(kind, noise):
    """Of y's squared error, where y is solved for from a point and a wrong velocity."""
    inner = TIMES[1:-1]

    def ratio(t):
        path = at(kind, t, noise)
        return path.alpha**2 / path.beta**2

    _, rate = torch.func.jvp(ratio, (inner,), (torch.ones_like(inner),))
    path = at(kind, inner, noise)
    y, z, wrong = torch.randn(3, len(inner), dtype=torch.float64)
    system = torch.stack(
        (path.alpha, path.beta, path.alpha_rate, path.beta_rate), -1
    ).reshape(-1, 2, 2)
    seen = torch.stack((path.point(y, z), path.velocity(y, z) + wrong), -1)
    solved = torch.linalg.solve(system, seen)[:, 0]
    expected = -rate / 2 * (solved - y) ** 2
    torch.testing.assert_close(path.likelihood_weight * wrong**2, expected)
