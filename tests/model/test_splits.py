"""Levels of couplings and of split flows: built, refused, and of the whole model."""

import math

import pytest
import torch
from fields import awake
from models import images, seeded

from mrcnf.errors import UserError
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.coupling import CouplingFlow
from mrcnf.flows.multiscale import MultiscaleFlow
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image.noise import dequantise
from mrcnf.model.building import build_flow
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, FlowConfig, ModelConfig

FIELD = FieldConfig(width=4, depth=1)
COUPLING = FlowConfig("coupling", couplings=2)
SPLIT = FlowConfig("coupling", couplings=2, splits=1, shuffle="context", prior="conditional")


def model_of(flow, resolutions=(4, 8), channels=1, field=FIELD, size=0.1, **settings):
    """A model with random weights, fitted to random images, in double precision."""
    config = ModelConfig(resolutions=resolutions, channels=channels, **settings)
    solver = Solver("rk4", steps=6)
    levels = [Level(config, r, field, solver, Trace("exact"), flow) for r in resolutions]
    model = awake(MultiResolutionFlow(levels), size)
    x, _ = dequantise(images(64, config), nbits=config.nbits, dtype=torch.float64)
    for level in model:
        level.fit_standardisation(x)
    return model


# -- building ----------------------------------------------------------------------------------


def test_settings_make_the_flow_that_they_name():
    kinds = {
        ContinuousFlow: FlowConfig(),
        CouplingFlow: COUPLING,
        MultiscaleFlow: FlowConfig(splits=2),
    }
    for kind, settings in kinds.items():
        assert type(build_flow(settings, FIELD, 3)) is kind
    split = build_flow(FlowConfig("coupling", couplings=3, splits=2), FIELD, 3, 1)
    assert [len(flow.couplings) for flow in split.flows] == [3, 3, 3]
    assert [len(next(iter(flow)).shift) for flow in split.flows] == [12, 24, 48]
    continuous = build_flow(FlowConfig(splits=1), FieldConfig(width=4, depth=1, blocks=2), 1)
    assert [len(flow.fields) for flow in continuous.flows] == [2, 2]


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"kind": "spline"}, "flow.kind 'spline': choose one of continuous, coupling"),
        ({"shuffle": "sorted"}, "flow.shuffle 'sorted': choose one of none, random, learned"),
        ({"prior": "wide", "splits": 1}, "flow.prior 'wide': choose one of normal, conditional"),
        ({"shuffle": "learned"}, "flow.shuffle = learned is of split flows; set flow.splits to 1"),
        ({"prior": "conditional"}, "flow.prior = conditional is of split flows"),
        ({"couplings": 0}, "flow.couplings and flow.reorder_every must be at least 1"),
        ({"reorder_every": 0}, "flow.couplings and flow.reorder_every must be at least 1"),
        ({"splits": -1}, "flow.splits at least 0"),
    ],
)
def test_settings_that_make_no_flow_are_refused(wrong, words):
    with pytest.raises(UserError, match=words) as error:
        FlowConfig(**wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flow, field, words",
    [
        (COUPLING, {"kind": "paper"}, "field.kind = paper is of continuous flows"),
        (COUPLING, {"blocks": 2}, "field.blocks = 2 is of continuous flows"),
        (COUPLING, {"path": "variance-preserving"}, "field.path = variance-preserving"),
        (COUPLING, {"lattice": True}, "field.lattice is of continuous flows without splits"),
        (FlowConfig(splits=1), {"lattice": True}, "field.lattice is of continuous flows without"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(flow, field, words):
    with pytest.raises(UserError, match=f"level 4: {words}") as error:
        build_flow(flow, FieldConfig(width=4, depth=1, **field), 1, name="level 4")
    assert "\n" not in str(error.value)


def test_more_splits_than_the_size_allows_are_one_clear_line():
    config = ModelConfig(resolutions=(8, 16), channels=1)
    Level(config, 16, FIELD, flow=FlowConfig("coupling", splits=2))
    with pytest.raises(UserError) as error:
        Level(config, 16, FIELD, flow=FlowConfig("coupling", splits=3))
    assert str(error.value) == (
        "level 16 works on 8×8 positions, which cannot be halved 4 times; lower flow.splits or "
        "field.scales"
    )
    with pytest.raises(UserError, match=r"5×5 positions.*halved 1 times"):
        Level(ModelConfig(resolutions=(5,), channels=1), 5, FIELD, flow=COUPLING)
    Level(ModelConfig(resolutions=(5,), channels=3), 5, FIELD, flow=COUPLING)


@pytest.mark.parametrize(
    "flow, scales, channels, expected",
    [
        (FlowConfig(), 1, 1, 0),
        (FlowConfig(), 3, 1, 2),
        (COUPLING, 1, 1, 1),
        (COUPLING, 1, 3, 0),
        (FlowConfig("coupling", splits=1), 1, 1, 2),
        (FlowConfig("coupling", splits=2), 2, 3, 4),
        (FlowConfig(splits=2), 1, 1, 3),
    ],
)
def test_sides_are_halved_as_often_as_the_flow_says_and_no_less(flow, scales, channels, expected):
    field = FieldConfig(width=4, depth=1, scales=scales)
    built, side = build_flow(flow, field, channels), 2**expected
    assert built.halvings == expected
    solver = Solver("euler", steps=1)
    assert built.transport(torch.zeros(1, channels, side, side), solver=solver).isfinite().all()
    if expected:
        with pytest.raises(RuntimeError):
            built.transport(torch.zeros(1, channels, side // 2, side // 2), solver=solver)


def test_a_model_takes_multiples_of_what_its_flows_halve():
    assert model_of(COUPLING, (2, 4)).multiple == 4
    assert model_of(COUPLING, (2, 4), channels=3).multiple == 2
    assert model_of(SPLIT, (4, 8)).multiple == 8
    assert model_of(FlowConfig(splits=1), (4,)).multiple == 4
    twice = FlowConfig("coupling", couplings=1, splits=2)
    assert model_of(twice, (8, 16)).multiple == 16
    deep = FieldConfig(width=4, depth=1, scales=2)
    assert model_of(COUPLING, (4, 8), channels=3, field=deep).multiple == 4


# -- of any size -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 16), (16, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_split_model_serves_other_sizes(size, channels):
    model = model_of(SPLIT, channels=channels)
    x = torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8)
    latents = model.encode(x, generator=seeded())
    assert torch.equal(model.decode(latents), x)
    assert model.bits_per_dim(x, generator=seeded()).isfinite().all()
    assert model.sample(2, size=size, generator=seeded()).shape == (2, channels, *size)
    with pytest.raises(UserError, match="multiples of 8"):
        model.bits_per_dim(x[..., :12, :12])


def test_the_density_of_another_size_is_the_change_of_variables():
    """From pixels to all latents at once: one Jacobian by autograd, no level's arithmetic."""
    model = model_of(SPLIT)
    x, _ = dequantise(torch.randint(0, 256, (1, 1, 8, 16), dtype=torch.uint8), dtype=torch.float64)

    def push(x):
        return torch.cat([level.encode(x).flatten() for level in model])

    jacobian = torch.autograd.functional.jacobian(push, x).reshape(128, 128)
    normal = -0.5 * (push(x).square().sum() + 128 * math.log(2 * math.pi))
    expected = normal + torch.linalg.slogdet(jacobian).logabsdet
    found = sum(level.log_prob(x).log_prob for level in model)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-7)


def test_split_flows_with_attention_serve_larger_images_in_tiles():
    model = model_of(SPLIT, (8,), field=FieldConfig(width=4, depth=1, attention=True))
    (level,) = model
    x, _ = dequantise(torch.randint(0, 256, (2, 1, 8, 16), dtype=torch.uint8), dtype=torch.float64)
    whole = level.log_prob(x)
    tiles = [level.log_prob(part) for part in x.split(8, dim=3)]
    torch.testing.assert_close(whole.log_prob, tiles[0].log_prob + tiles[1].log_prob)
    torch.testing.assert_close(level.generate(level.encode(x), None), x, rtol=0, atol=1e-9)


# -- samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", [COUPLING, SPLIT])
def test_temperature_reaches_what_was_factored_out(flow):
    model = model_of(flow)
    cold = [model.sample(3, temperature=0.0, generator=seeded(seed)) for seed in (1, 2)]
    assert torch.equal(*cold) and all(torch.equal(image, cold[0][0]) for image in cold[0])
    warm = model.sample(3, temperature=0.7, generator=seeded())
    assert not torch.equal(warm[0], warm[1])
    # At 0 it is the image of no noise at all, whatever a prior has learned.
    base, fine = model
    coarse = base.generate(torch.zeros(1, 1, 4, 4, dtype=torch.float64), None)
    noise = torch.zeros(1, *fine.latent_shape(8, 8), dtype=torch.float64)
    image = (fine.generate(noise, coarse) * 256).floor().clamp(0, 255).to(torch.uint8)
    assert torch.equal(image, cold[0][:1])


@pytest.mark.parametrize("flow", [COUPLING, SPLIT, FlowConfig(splits=1, shuffle="random")])
def test_latents_are_packed_to_the_shape_of_their_level(flow):
    model = model_of(flow)
    x = images(2, model.config)
    latents = model.encode(x, generator=seeded())
    assert {r: tuple(z.shape[1:]) for r, z in latents.items()} == {4: (1, 4, 4), 8: (3, 4, 4)}
    for level in model:
        noisy, _ = dequantise(x, generator=seeded(), dtype=torch.float64)
        found = level.log_prob(noisy).latent
        torch.testing.assert_close(found, latents[level.resolution], rtol=0, atol=1e-10)
    big = model.upscale(x[..., :4, :4], generator=seeded())
    assert big.shape == (2, 1, 8, 8)


# -- all images of bits ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "resolutions, flow", [((2, 4), COUPLING), ((4,), SPLIT)], ids=["pyramid", "split"]
)
def test_the_bounds_of_all_images_of_bits_add_up_to_less_than_one(resolutions, flow):
    model = model_of(flow, resolutions, size=0.05, nbits=1).float()
    for level in model:  # crowd the unit cube
        level.units.std.mul_(0.8)
    bits = (torch.arange(2**16)[:, None] >> torch.arange(16)) & 1
    x = (bits * 255).to(torch.uint8).reshape(-1, 1, 4, 4)
    generator = seeded()
    with torch.no_grad():
        bounds = torch.cat([model.log_prob(part, generator=generator) for part in x.split(2**14)])
    probabilities = bounds.double().exp()
    # One draw each: the mean of their sum is the mass of the cube, at most 1.
    total, error = probabilities.sum(), probabilities.std() * 2**8
    assert 0.2 < total < 1 + 3 * error and error < 0.1
