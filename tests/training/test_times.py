"""Training times: their distributions, stratified over the batch."""

import math

import pytest
import torch

from mrcnf.errors import UserError
from mrcnf.runs.settings import TIMES
from mrcnf.training.times import SHORTEST_TIME, draw_times


def ks(sample, cumulative):
    """√n times the largest gap between empirical and true distribution functions."""
    ordered = sample.sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return (steps - cumulative(ordered)).abs().max() * math.sqrt(len(ordered))


@pytest.mark.parametrize("noise", [0.0, 0.04, 0.3])
@pytest.mark.parametrize("kind", TIMES)
def test_times_have_their_distribution(kind, noise):
    """Log-uniform is the noise of the path, which the data's own adds to."""
    like = torch.zeros(1, dtype=torch.float64)
    t = draw_times(20_000, kind, like[0] + noise, like)
    low = max(noise, SHORTEST_TIME)
    assert t.dtype == torch.float64 and t.shape == (20_000,)
    assert t.min() >= 0 and t.max() <= 1

    def uniform(x):
        return x

    def log_uniform(x):
        beta = noise + (1 - noise) * x
        return (1 - beta.log() / math.log(low)).clamp_min(0)

    def mixed(x):
        return (uniform(x) + log_uniform(x)) / 2

    def logit_normal(x):
        return torch.special.ndtr((x.logit() + 1.0) / 1.2)

    known = {"uniform": uniform, "mixed": mixed, "logit-normal": logit_normal}
    expected = known.get(kind, log_uniform)
    assert ks(t, expected) < 1.5  # stratification makes it far less than that


def test_times_are_stratified_over_the_batch():
    t = draw_times(50, "uniform", torch.zeros(()), torch.zeros(1, dtype=torch.float64))
    assert torch.equal((t * 50).floor().sort().values, torch.arange(50, dtype=torch.float64))
    assert not torch.equal(t.sort().values, t)


def test_unknown_times_are_refused():
    with pytest.raises(UserError, match=r"'normal'.*logit-normal, mixed, uniform"):
        draw_times(4, "normal", torch.zeros(()), torch.zeros(1))
