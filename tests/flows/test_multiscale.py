"""Split flows: what leaves and what stays, under which prior, and what it costs."""

import math

import pytest
import torch
from fields import awake

from mrcnf.errors import UserError
from mrcnf.flows.base import log_normal
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.shuffle import SHUFFLES, entropy
from mrcnf.flows.solve import Solver
from mrcnf.flows.squeeze import squeeze
from mrcnf.flows.trace import Trace
from mrcnf.model.building import build_flow
from mrcnf.model.settings import FieldConfig, FlowConfig

HOW = {"solver": Solver("midpoint", steps=3), "trace": Trace("exact")}
FIELD = FieldConfig(width=4, depth=1)


def flow_of(kind="coupling", coarse=0, channels=1, **settings):
    flow = FlowConfig(kind, couplings=2, **{"splits": 1, **settings})
    return build_flow(flow, FIELD, channels, coarse, name="level 4")


def data(n=3, side=4, channels=1, coarse=0):
    y = torch.randn(n, channels, side, side, dtype=torch.float64)
    return y, torch.randn(n, coarse, side, side, dtype=torch.float64) if coarse else None


@pytest.mark.parametrize("kind", ["coupling", "continuous"])
def test_what_stays_and_what_leaves_add_up_to_the_density(kind):
    flow = awake(flow_of(kind, 1, splits=2, shuffle="context", prior="conditional"))
    y, coarse = data(side=8, coarse=1)
    first, second = flow.split(y, coarse, **HOW)
    assert first.stays.shape == first.leaves.shape == (3, 2, 4, 4)
    assert second.stays.shape == second.leaves.shape == (3, 4, 2, 2)
    expected = flow.log_prob(y, coarse, **HOW)

    def own(i, y, split, told):
        """Volume of the scale's flow and density of what leaves."""
        found = flow.flows[i].log_prob(squeeze(y), told, **HOW)
        prior = torch.distributions.Normal(split.mean, split.log_std.exp())
        left = prior.log_prob(split.leaves).flatten(1).sum(1)
        return found.log_prob - log_normal(found.latent) + left

    told = squeeze(coarse)
    total = first.log_prob + own(0, y, first, told)
    torch.testing.assert_close(total, expected.log_prob)
    half = torch.nn.functional.avg_pool2d(told, 2)
    rest = second.log_prob + own(1, first.stays, second, half)
    torch.testing.assert_close(rest, first.log_prob)


def test_a_conditional_prior_depends_on_what_stays_and_on_the_coarse_image():
    flow = awake(flow_of(coarse=1, prior="conditional"), 0.5)
    (gate,) = flow.gates
    stays = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    told = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    before = gate.moments(stays, told)
    for changed in (gate.moments(stays + 1, told), gate.moments(stays, told + 1)):
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(before, changed, strict=True))
    mean, log_std = before
    assert mean.shape == log_std.shape == stays.shape and log_std.abs().max() <= 2


def test_a_conditional_prior_starts_as_the_standard_normal():
    torch.manual_seed(3)
    normal = flow_of()
    torch.manual_seed(3)
    conditional = flow_of(prior="conditional")
    y, _ = data()
    found = [flow.double().log_prob(y).log_prob for flow in (normal, conditional)]
    assert torch.equal(*found)


def test_latents_of_what_left_are_in_standard_units():
    """The noise of a conditional prior is what it leaves of what leaves."""
    flow = awake(flow_of(prior="conditional"), 0.5)
    y, _ = data()
    (split,) = flow.split(y)
    latent = squeeze(flow.transport(y))
    torch.testing.assert_close(latent[:, 2:], (split.leaves - split.mean) / split.log_std.exp())
    assert (latent[:, 2:] - split.leaves).abs().max() > 0.1


@pytest.mark.parametrize("prior", ["normal", "conditional"])
def test_noise_of_what_left_reaches_the_image(prior):
    flow = awake(flow_of(prior=prior, splits=2))
    z, _ = data(side=8)
    whole = flow.transport(z, backwards=True)
    rest, left = flow._unpacked(z)
    assert torch.equal(flow.pack(rest, left), z)
    for i in range(2):
        silent = [noise * (k != i) for k, noise in enumerate(left)]
        image = flow.transport(flow.pack(rest, silent), backwards=True)
        assert (image - whole).abs().max() > 0.05
        found = flow.transport(image)
        torch.testing.assert_close(found, flow.pack(rest, silent), rtol=0, atol=1e-10)


def test_every_scale_starts_from_data():
    flow = awake(flow_of(splits=2, shuffle="entropy"))
    y = 3 * torch.randn(200, 1, 8, 8, dtype=torch.float64) + 2
    flow.initialise(y)
    for i, split in enumerate(flow.split(y)):
        x = y if i == 0 else flow.split(y)[i - 1].stays
        coupling = next(iter(flow.flows[i]))
        normalised = (squeeze(x) + coupling.shift) * coupling.log_scale.exp()
        assert normalised.mean((0, 2, 3)).abs().max() < 1e-10
        assert (normalised.std((0, 2, 3)) - 1).abs().max() < 1e-10
        # Measured too: what leaves has more entropy than what stays, channel by channel.
        assert entropy(split.stays).max() <= entropy(split.leaves).min() + 1e-9


def test_reordering_measures_what_the_flow_makes_now():
    flow = flow_of(shuffle="entropy").double()
    assert flow.reorders and not flow_of(shuffle="learned").reorders
    scales = torch.tensor([8.0, 2.0, 4.0, 1.0], dtype=torch.float64)[:, None, None]
    latents = torch.randn(300, 4, 2, 2, dtype=torch.float64) * scales
    y = flow.flows[0].transport(latents, backwards=True)
    y = torch.nn.functional.pixel_shuffle(y, 2)  # of one channel, the same as unsqueezing
    (gate,) = flow.gates
    assert gate.shuffle.fixed.tolist() == [0, 1, 2, 3]
    flow.reorder(y)
    assert gate.shuffle.fixed.tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize("prior", ["normal", "conditional"])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_flows_start_the_same_whatever_they_are_split_by(shuffle, prior):
    torch.manual_seed(5)
    plain = flow_of(splits=2)
    torch.manual_seed(5)
    other = flow_of(splits=2, shuffle=shuffle, prior=prior)
    one, two = plain.flows.state_dict(), other.flows.state_dict()
    assert one.keys() == two.keys() and len(one) > 30
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_regularisers_are_the_scales_own_by_dimensions():
    flow = awake(flow_of("continuous"))
    y, _ = data()
    found = flow.log_prob(y, regularise=True, **HOW)
    first = flow.flows[0].log_prob(squeeze(y), regularise=True, **HOW)
    stays = first.latent[:, :2]
    second = flow.flows[1].log_prob(squeeze(stays), regularise=True, **HOW)
    for name in ("kinetic", "frobenius"):
        parts = [getattr(result, name) for result in (first, second)]
        torch.testing.assert_close(getattr(found, name), parts[0] + parts[1] / 2)
        assert parts[0].min() > 0 and parts[1].min() > 0
    evaluations = [result.statistics.evaluations for result in (first, second)]
    assert found.statistics.evaluations == sum(evaluations)


def test_penalties_of_learned_shuffles_add_up_in_training_alone():
    flow = awake(flow_of(splits=2, shuffle="learned"))
    y, _ = data(side=8)
    parts = [split.penalty for split in flow.split(y)]
    torch.testing.assert_close(flow.log_prob(y).penalty, parts[0] + parts[1])
    assert flow.eval().log_prob(y).penalty is None


@pytest.mark.parametrize("kind", ["coupling", "continuous"])
def test_split_flows_have_no_velocity(kind):
    with pytest.raises(UserError, match=r"level 4.*MultiscaleFlow.*train\.objective = likelihood"):
        flow_of(kind).check_velocity()


def test_a_split_flow_at_rest_is_the_normal():
    flow = flow_of(splits=2, channels=3).double()
    y, _ = data(side=8, channels=3)
    expected = -0.5 * (y.square().flatten(1).sum(1) + 192 * math.log(2 * math.pi))
    torch.testing.assert_close(flow.log_prob(y).log_prob, expected)


def test_no_two_steps_share_their_probes(monkeypatch):
    """Each step's are of the seed that its flow is given and its own number."""
    seeds, steps = [], ContinuousFlow.steps

    def watched(flow, *args, seed, **how):
        found = list(steps(flow, *args, seed=seed, **how))
        seeds.extend(seed + i for i in range(len(found)))
        return iter(found)

    monkeypatch.setattr(ContinuousFlow, "steps", watched)
    flow = flow_of("continuous", splits=2)
    list(flow.steps(None, Solver("midpoint", steps=12), seed=7))
    assert len(seeds) == 36 and len(set(seeds)) == 36 and seeds[0] == 7
