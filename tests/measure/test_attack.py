"""The attack on code lengths: what it may change, and what it must find."""

import math

import pytest
import torch
from fields import awake
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import images, smooth_images, trained

import mrcnf
from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image.noise import dequantise
from mrcnf.measure.ascent import ascend
from mrcnf.measure.attack import attack, bits_and_gradient, checkerboard, random_signs
from mrcnf.measure.evaluate import bits_by_level
from mrcnf.measure.robustness import robustness
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, FlowConfig, ModelConfig

COUPLINGS = FlowConfig(kind="coupling", couplings=2)
SPLIT = FlowConfig(kind="coupling", couplings=1, splits=1)
FIELD = FieldConfig(width=4, depth=1)


def build(flow=None, resolutions=(4, 8), size=0.1, field=FIELD, **model):
    """A model with random weights, its units fitted to smooth images, in double precision."""
    config = ModelConfig(resolutions=resolutions, channels=1, **model)
    levels = [
        Level(config, r, field, Solver("midpoint", steps=2), Trace(), flow) for r in resolutions
    ]
    made = awake(MultiResolutionFlow(levels), size).eval()
    x, _ = dequantise(smooth_images(64, side=resolutions[-1]), nbits=config.nbits,
                      kind=config.pixel_noise, dtype=torch.float64)  # fmt: skip
    for level in made:
        level.fit_standardisation(x)
    return made


MODELS = {
    "continuous": {},
    "couplings": {"flow": COUPLINGS},
    "split": {"flow": SPLIT},
    "one resolution": {"resolutions": (8,)},
    "integer pyramid": {"flow": COUPLINGS, "pyramid": "integer"},
    "learned noise": {"flow": COUPLINGS, "dequantisation": "variational"},
    "integer pyramid, learned noise":
        {"flow": COUPLINGS, "pyramid": "integer", "dequantisation": "variational"},
    "gaussian noise": {"dequantisation": "gaussian"},
    "4 bits": {"flow": COUPLINGS, "nbits": 4},
}  # fmt: skip


@given(
    seed=st.integers(0, 2**32), epsilon=st.integers(1, 255), steps=st.integers(1, 4),
    stride=st.floats(1e-3, 1e4), scatter=st.booleans(),
    extreme=st.sampled_from([1.0, math.inf, math.nan]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_nothing_leaves_the_ball_or_the_range(seed, epsilon, steps, stride, scatter, extreme):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(-60, 316, (2, 1, 4, 4), generator=generator).clamp(0, 255)
    pixels = pixels.to(torch.uint8)

    def slope(at):
        assert at.dtype == torch.uint8
        assert int((at.int() - pixels.int()).abs().max()) <= epsilon
        return extreme * torch.randn(at.shape, generator=generator)

    found = ascend(pixels, slope, epsilon=epsilon, steps=steps, step_size=stride,
                   generator=generator, scatter=scatter)  # fmt: skip
    for changed in (found, random_signs(pixels, epsilon, seed), checkerboard(pixels, epsilon)):
        assert changed.dtype == torch.uint8 and changed.shape == pixels.shape
        assert int((changed.int() - pixels.int()).abs().max()) <= epsilon


def test_random_signs_move_every_pixel_that_can_move():
    signs = random_signs(torch.full((50, 1, 4, 4), 100, dtype=torch.uint8), 3).int() - 100
    assert set(signs.unique().tolist()) == {-3, 3} and abs(signs.float().mean()) < 0.5


def test_a_checkerboard_opposes_all_neighbours_and_an_attack_is_no_weaker():
    board = checkerboard(torch.full((1, 3, 4, 4), 100, dtype=torch.uint8), 3)[0].int() - 100
    assert set(board.unique().tolist()) == {-3, 3}
    for dim in range(3):
        assert not (board.narrow(dim, 1, 2) + board.narrow(dim, 0, 2)).any()
    model, pixels = build(COUPLINGS, size=0.3), smooth_images(4, side=8, seed=5)
    weak = attack(model, pixels, epsilon=8, steps=1, step_size=0.6).pixels
    bits = [bits_by_level(model, p, seed=3).sum(0) for p in (weak, checkerboard(pixels, 8), pixels)]
    assert bits[1].mean() > bits[2].mean() + 0.1, "what the attack must not miss"
    assert bits[0].mean() > bits[1].mean() - 1e-3


@pytest.mark.parametrize("minimise", [False, True])
def test_a_gaussian_is_attacked_as_algebra_says(minimise):
    """Bits of a normal density grow with the distance from its mean, pixel by pixel."""
    model = build(resolutions=(4,), size=0.0, field=FieldConfig(kind="paper", width=4),
                  whiten=False)  # fmt: skip
    (level,) = model
    centre = float(level.units.mean) * 256 - 0.5  # of the integers
    pixels = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    found = attack(model, pixels, epsilon=3, steps=16, minimise=minimise).pixels
    away = pixels.double() - centre
    if minimise:
        expected = (pixels - away.clamp(-3, 3).round()).clamp(0, 255)
        assert int((found.double() - expected).abs().max()) <= 1  # noise blurs the mean itself
    else:
        expected = (pixels + 3 * away.sign()).clamp(0, 255)
        decided = away.abs() > 1
        assert torch.equal(found[decided], expected.to(torch.uint8)[decided])


@pytest.mark.parametrize("name", MODELS)
def test_the_attack_beats_random_signs_on_every_model(name):
    model = build(**MODELS[name])
    epsilon = 16 if name == "4 bits" else 4
    pixels = smooth_images(2, side=8, seed=5)
    found = attack(model, pixels, epsilon=epsilon, steps=4, seed=1).pixels

    def bits(changed):
        return float(bits_by_level(model, changed, draws=3, seed=9).sum(0).mean())

    assert bits(found) > max(bits(random_signs(pixels, epsilon)), bits(pixels))
    fewer = attack(model, pixels, epsilon=epsilon, steps=4, minimise=True).pixels
    assert bits(fewer) < bits(pixels)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["integer pyramid", "integer pyramid, learned noise"])
def test_gradients_pass_the_roundings(name):
    """Finite differences over steps of the lattice, along the gradient's signs."""
    model = build(**MODELS[name])
    pixels = smooth_images(2, side=8, seed=5)
    _, gradient = bits_and_gradient(list(model), pixels, 8, torch.Generator().manual_seed(0))
    step = 2 * gradient.sign()
    up, down = ((pixels + sign * step).clamp(0, 255).to(torch.uint8) for sign in (1, -1))
    higher, lower = (bits_by_level(model, p, draws=8, seed=1).sum(0) for p in (up, down))
    slope = (gradient * step).flatten(1).sum(1) / 256
    measured = (higher - lower) / 2
    assert torch.allclose(slope.double(), measured, rtol=0.35, atol=0)


def test_learned_noise_keeps_the_gradient_of_the_pixels():
    """Its floor hides the integers from x, but not from the gradient."""
    model = build(**MODELS["learned noise"])
    pixels = smooth_images(2, side=8, seed=5)
    _, gradient = bits_and_gradient(list(model), pixels, 8, torch.Generator().manual_seed(0))
    up, down = ((pixels + s * gradient.sign()).to(torch.uint8) for s in (1, -1))
    higher, lower = (bits_by_level(model, p, draws=8, seed=1).sum(0) for p in (up, down))
    slope = gradient.abs().flatten(1).sum(1) / 256
    assert torch.allclose(slope.double(), (higher - lower) / 2, rtol=0.2, atol=0)


def test_more_steps_and_restarts_find_no_less():
    model, pixels = build(COUPLINGS, size=0.3), smooth_images(4, side=8, seed=5)

    def mean(**how):
        found = attack(model, pixels, epsilon=8, **how)
        assert len(found.trajectory) == how["steps"]
        return float(bits_by_level(model, found.pixels, seed=3).sum(0).mean())

    once, some, many = (mean(steps=steps) for steps in (1, 4, 12))
    assert once < some < many
    assert mean(steps=4, restarts=3) > some - 1e-3


def test_the_image_itself_is_kept_where_the_attack_found_worse():
    model, pixels = build(COUPLINGS, size=0.3), smooth_images(4, side=8, seed=5)
    wild = attack(model, pixels, epsilon=60, steps=1, step_size=60, minimise=True)
    assert torch.equal(wild.pixels, pixels)


def test_batches_and_seeds():
    model, pixels = build(COUPLINGS), smooth_images(5, side=8)
    first = attack(model, pixels, epsilon=2, steps=2, batch=2)
    again = attack(model, pixels, epsilon=2, steps=2, batch=2)
    assert torch.equal(first.pixels, again.pixels) and first.trajectory == again.trajectory


def test_a_table_of_natural_attacked_random_and_transferred():
    model, other = build(COUPLINGS, size=0.3), build(SPLIT, size=0.3)
    pixels = smooth_images(4, side=8, seed=5)
    found = robustness(model, pixels, (2, 4), transfer=other, steps=6, budgets=(1, 6))
    for row in found.rows:
        assert row.attacked > row.transferred > row.natural
        assert row.increase == pytest.approx(row.attacked - row.natural)
        assert sum(level["increase"] for level in row.levels) == pytest.approx(row.increase)
        assert [point["steps"] for point in row.curve] == [1, 6]
        assert row.curve[1]["attacked"] == row.attacked > row.curve[0]["attacked"]
        assert set(row.sizes["PNG"]) == {"natural", "attacked", "random", "transferred"}
    table = found.to_dict()
    assert table["rows"][1]["epsilon"] == 4 and "pixels" not in table
    assert "maximising attack in 6 steps" in str(found)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"epsilon": 0}, "from 1 to 255, got 0"), ({"epsilon": 256}, "from 1 to 255"),
        ({"epsilon": 2.5}, "whole number"), ({"steps": 0}, "steps of an attack"),
        ({"restarts": 0}, "restarts of an attack"), ({"step_size": math.nan}, "step size"),
        ({"batch": 0}, "batch"), ({"draws": 0}, "draws"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(how, words):
    with pytest.raises(UserError, match=words):
        attack(build(COUPLINGS), smooth_images(2, side=8), **({"epsilon": 1} | how))


def test_images_that_do_not_fit_are_refused():
    model = build(COUPLINGS)
    for pixels in (smooth_images(2, channels=3, side=8), smooth_images(2, side=6)):
        with pytest.raises(UserError):
            attack(model, pixels, epsilon=1)
        with pytest.raises(UserError):
            robustness(model, pixels, (1,))
    with pytest.raises(UserError, match="at least 2"):
        robustness(model, smooth_images(1, side=8), (1,))
    with pytest.raises(UserError, match="no epsilon"):
        robustness(model, smooth_images(2, side=8), ())


@pytest.mark.slow
def test_a_trained_model_is_attacked_three_times_as_hard_as_by_chance(tmp_path):
    settings = ["train.objective=likelihood", "model.resolutions=[8]", "flow.kind=coupling",
                "flow.couplings=4", "train.steps=300", "train.batch=32"]  # fmt: skip
    for seed in (0, 1):
        trained(tmp_path / f"{seed}", *settings, f"train.seed={seed}", data=images(256, side=8))
    model, other = (mrcnf.load(tmp_path / f"{seed}") for seed in (0, 1))
    pixels = smooth_images(16, side=8, seed=7)
    (row,) = robustness(model, pixels, (4,), transfer=other, steps=30, budgets=(1, 15, 30)).rows
    assert row.increase > 3 * row.random_increase
    assert row.increase > row.transferred_increase
    first, half, whole = (point["attacked"] for point in row.curve)
    assert first < half and abs(whole - half) < 0.1 * (half - first)
