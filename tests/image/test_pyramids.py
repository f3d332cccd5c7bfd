"""The two pyramids: what both promise, and what the integer one adds."""

import pytest
import torch
from fields import awake
from hypothesis import given, settings
from hypothesis import strategies as st

from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image import haar
from mrcnf.image.noise import NOISES, dequantise
from mrcnf.image.pyramids import PYRAMIDS, Exact, Integer, build
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, ModelConfig

EVERY_KIND = pytest.mark.parametrize("kind", PYRAMIDS)


def integers(n=5, side=8, nbits=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2**nbits, (n, 3, side, side), generator=generator)


def dequantised(x, nbits=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    return (x + u) / 2**nbits


@EVERY_KIND
@pytest.mark.parametrize("nbits", [1, 5, 8])
def test_merging_undoes_splitting(kind, nbits):
    x = dequantised(integers(nbits=nbits), nbits)
    detail, coarse = build(kind, nbits).down(x)
    assert detail.shape == (5, 9, 4, 4) and coarse.shape == (5, 3, 4, 4)
    torch.testing.assert_close(build(kind, nbits).up(detail, coarse), x, rtol=0, atol=1e-12)


@EVERY_KIND
def test_splitting_keeps_volumes(kind):
    """|det| of the Jacobian is 1: the integer form moves cells about, and noise within them."""
    x = dequantised(integers(1, side=4))

    def flat(v):
        return torch.cat([part.flatten() for part in build(kind).down(v)])

    jacobian = torch.autograd.functional.jacobian(flat, x).reshape(48, 48)
    assert jacobian.det().abs() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("nbits", range(1, 9))
def test_single_precision_keeps_every_integer(nbits):
    x = integers(64, nbits=nbits)
    for u in (0.0, 0.5, 1 - torch.finfo(torch.float32).eps * 2**nbits):
        noisy = ((x + u) / 2**nbits).float()
        detail, coarse = Integer(nbits).down(noisy)
        details, means = haar.lift(x.to(torch.int32))
        assert torch.equal((detail * 2**nbits).floor(), details.float())
        assert torch.equal((coarse * 2**nbits).floor(), means.float())
        back = Integer(nbits).up(detail, coarse)
        assert torch.equal((back * 2**nbits).floor(), x.float())


def test_integer_levels_are_of_the_lifted_integers_and_keep_the_noise():
    x = integers()
    noisy = dequantised(x)
    detail, coarse = Integer().down(noisy)
    details, means = haar.lift(x.to(torch.int32))
    assert torch.equal((detail * 256).floor(), details.double())
    assert torch.equal((coarse * 256).floor(), means.double())
    before = (noisy * 256 % 1).flatten().sort().values
    after = torch.cat((detail.flatten(), coarse.flatten()))
    torch.testing.assert_close((after * 256 % 1).sort().values, before, rtol=0, atol=1e-9)


def test_integer_levels_are_given_integers():
    """The condition does not change with the noise: each level is a bound by itself."""
    model = ModelConfig(resolutions=(2, 4, 8), channels=3, pyramid="integer")
    level = Level(model, 4).double()
    x = integers()
    _, coarse = level.coefficients((x.double() + 0.1) / 256)
    detail, other = level.coefficients((x.double() + 0.9) / 256)
    assert not torch.equal(coarse, other)
    assert torch.equal(level.condition(coarse), level.condition(other))
    _, coarser = haar.lift(haar.lift(x.to(torch.int32))[1])
    # Untrained levels do not standardise.
    known = level.condition(coarse) * 256 - 0.5
    torch.testing.assert_close(known, coarser.double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(detail * 256 % 1, torch.full_like(detail, 0.9), rtol=0, atol=1e-9)


def test_reducing_is_splitting_again_and_again():
    x = dequantised(integers())
    _, coarse = Integer().down(x)
    _, coarse = Integer().down(coarse)
    assert torch.equal(Integer().coarsen(x, 2), coarse)


def awake_model(noise="uniform"):
    """Three levels of random weights: fields that listen to their coarse images."""
    config = ModelConfig(
        resolutions=(2, 4, 8), channels=3, pyramid="integer", dequantisation=noise
    )
    field = FieldConfig(width=4, depth=1)
    solver = Solver("rk4", steps=20)
    levels = [Level(config, r, field, solver, Trace("exact")) for r in config.resolutions]
    model = awake(MultiResolutionFlow(levels), size=0.05)
    images = integers().to(torch.uint8)
    for level in model:
        x, _ = dequantise(images, kind=config.pixel_noise, dtype=torch.float64)
        level.fit_standardisation(x)
    return model, images


@pytest.mark.parametrize("noise", NOISES)
def test_a_model_of_integers_decodes_what_it_encodes(noise):
    model, images = awake_model(noise)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(model.decode(model.encode(images, generator=generator)), images)


def test_upscaling_integers_keeps_them():
    model, images = awake_model()
    small = images[:, :, :2, :2]
    generator = torch.Generator().manual_seed(6)
    grown = model.upscale(small, temperature=3.0, generator=generator)
    assert grown.float().std() > small.float().std() / 4
    _, half = haar.lift(grown.to(torch.int32))
    _, quarter = haar.lift(half)
    assert torch.equal(quarter, small.to(torch.int32))


def test_contained_integers_are_in_range_and_those_that_fit_stay():
    x = integers(20)
    _, coarse = Integer().down(dequantised(x))
    detail, _ = Integer().down(dequantised(x))
    wild = Integer().up(detail + torch.randint(-40, 41, detail.shape) / 256, coarse)
    assert wild.min() < 0 and wild.max() > 1
    found = Integer().contain(wild, coarse)
    assert found.min() >= 0 and found.max() < 1
    _, means = haar.lift((found * 256).floor().to(torch.int32))
    assert torch.equal(means.double(), (coarse * 256).floor())
    fine = ((wild >= 0) & (wild < 1)).double()
    whole = torch.nn.functional.avg_pool2d(fine, 2).eq(1).repeat_interleave(2, 2)
    whole = whole.repeat_interleave(2, 3)
    torch.testing.assert_close(found[whole], wild[whole], rtol=0, atol=1e-12)


def test_unknown_pyramids_are_refused():
    with pytest.raises(UserError, match=r"'lifting'.*exact, integer"):
        ModelConfig(pyramid="lifting")


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 30.0]))
def test_contained_patches_keep_their_means_and_what_fits(seed, size):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    coarse[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    detail = size * torch.randn(2, 9, 4, 4, generator=generator, dtype=torch.float64)
    detail[1, :, 0, 0] = 0
    x = haar.merge(detail, coarse)
    held = Exact().contain(x, coarse)
    assert held.min() >= -1e-12 and held.max() <= 1 + 1e-12
    torch.testing.assert_close(haar.split(held)[1], coarse, rtol=0, atol=1e-12)
    # A patch that fits is left alone; one that does not touches an end.
    patches, before = (v.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2) for v in (held, x))
    fits = ((before >= 0) & (before <= 1)).all(-1)
    torch.testing.assert_close(patches[fits], before[fits], rtol=0, atol=1e-12)
    touching = ((patches < 1e-9) | (patches > 1 - 1e-9)).any(-1)
    assert touching[~fits].all()
