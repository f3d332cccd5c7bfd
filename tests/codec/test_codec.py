"""Whole files: what went in comes out, in as many bits as the model promises."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from small import model, noise, smooth

from mrcnf import codec
from mrcnf.codec import blocks, container, lane, pyramid
from mrcnf.codec.ans import Stack
from mrcnf.codec.settings import LevelSettings, Settings, default, with_steps
from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image.noise import log_density
from mrcnf.model.level import likelihoods
from mrcnf.model.settings import FieldConfig

RESIDUAL = FieldConfig(width=4, depth=1)
MODELS = {
    "exact": dict(),
    "one level": dict(resolutions=(4,)),
    "colours, three levels": dict(resolutions=(2, 4, 8), channels=3, field=RESIDUAL),
    "not whitened": dict(channels=3, whiten=False),
    "learned noise": dict(channels=3, dequantisation="variational"),
    "Gaussian noise": dict(dequantisation="gaussian"),
    "integers": dict(channels=3, pyramid="integer"),
    "integers, learned noise": dict(pyramid="integer", dequantisation="variational"),
    "two blocks": dict(field=FieldConfig(width=4, depth=1, blocks=2)),
    "U": dict(resolutions=(4, 8), field=FieldConfig(width=4, depth=1, scales=2)),
    "attention": dict(field=FieldConfig(width=4, depth=1, attention=True)),
}
EVERY = pytest.mark.parametrize("name", MODELS)
QUICK = ("learned noise", "integers, learned noise", "Gaussian noise", "two blocks")
STEPS = 2


def assorted(channels, side):
    """Images of several sizes: constants, extremes, noise, gradients; grey ones among them."""
    extremes = noise(1, side, channels)[0] // 128 * 255
    return [
        torch.zeros(channels, side, side, dtype=torch.uint8),
        torch.full((channels, side + 1, 1), 255, dtype=torch.uint8),
        extremes,
        *noise(3, side, 1, seed=1),
        *smooth(2, 2 * side, channels),
        noise(1, 2 * side, channels, seed=2)[0][:, :3, : side + 2],
    ]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow][name in QUICK :]) for name in MODELS]
)
def test_what_goes_in_comes_out(name):
    made = model(**MODELS[name])
    images = assorted(made.config.channels, made.config.finest)
    # Rough steps on purpose: no accuracy of theirs may matter for what comes out.
    coded = codec.encode(made, images, steps=STEPS, verify=False, bound=False)
    assert same(codec.decompress(made, coded.data), images) and not coded.stored


def test_one_image():
    image = smooth(1, 4)
    assert same(codec.decompress(model(), codec.compress(model(), image, steps=2)), list(image))


def excess(made, images, steps):
    """Coded bits over the model's bound on the same noise, a share, at full accuracy."""
    settings, size = with_steps(default(made), steps), blocks.Size(*images.shape[2:])
    words = np.random.default_rng(0).integers(1, 2**32, 40_000, dtype=np.uint32)
    group = blocks.Group(tuple(range(len(images))), size)
    coder = pyramid.coder_of(made, settings)
    with torch.no_grad():
        pushed = coder.push(Stack(words), [group], lambda _: images.long(), lambda _: None)
        (tally,) = pushed.tallies
        assert tally.rung == 0 and tally.spent.keys() == set(made.resolutions)
        log_q = log_density(tally.point * 256 - images, made.config.pixel_noise)
        x, rk4 = tally.point.float(), Solver("rk4", steps=12)
        bound = likelihoods(made, x, log_q.float(), solver=rk4, trace=Trace("exact"))
    bits = {r: -part.log_prob.sum().item() / math.log(2) for r, part in bound.items()}
    return sum(tally.spent.values()) / sum(bits.values()) - 1, [
        tally.spent[r] / bits[r] - 1 for r in made.resolutions
    ]


@pytest.mark.parametrize(
    "name",
    [
        "exact",
        "integers, learned noise",
        pytest.param("learned noise", marks=pytest.mark.slow),
        pytest.param("Gaussian noise", marks=pytest.mark.slow),
    ],
)
def test_excess_over_the_bound_falls_with_the_steps_to_nothing(name):
    made = model(**MODELS[name] | {"size": 0.1, "field": RESIDUAL})
    images = smooth(40, 8, made.config.channels)
    few, _ = excess(made, images, 2)
    many, by_level = excess(made, images, 16)
    assert few > 0.01 and few > 3 * many
    assert abs(many) < 0.015 and max(map(abs, by_level)) < 0.04


def test_numbers_of_a_file():
    made, images = model(), smooth(30, 8)
    coded = codec.encode(made, images, steps=8, verify=False)
    table = coded.table()
    assert table["bytes"] == len(coded.data) and table["images"] == 30 and not table["stored"]
    assert coded.bits_per_dim == 8 * len(coded.data) / images.numel()
    assert coded.overhead_percent == pytest.approx(100 * (coded.bits_per_dim / coded.bound - 1))
    assert coded.overhead_percent > coded.excess_percent and 0 < coded.begun < 30
    assert [level["resolution"] for level in table["levels"]] == [2, 4]


def test_noise_of_a_file_begins_small():
    """The first image is coded without a model, the next ones roughly."""
    coded = codec.encode(model(), smooth(30, 8), steps=2, verify=False, bound=False)
    rungs = container.unpack(coded.data).settings["rungs"]["0"]
    assert rungs[0] == 4 and rungs[-1] == 0 and sorted(rungs, reverse=True) == rungs


@pytest.mark.parametrize("resolution", [2, 4])
def test_coarse_images_come_from_the_beginning_of_a_file(resolution):
    made = model(resolutions=(2, 4, 8), channels=3, pyramid="integer", field=RESIDUAL)
    images = [*smooth(4, 8, 3), *smooth(1, 16, 3)]
    data = codec.compress(made, images, steps=STEPS)
    whole = container.unpack(data)
    prefix = sum(len(s.data) for s in whole.streams if s.resolution > resolution)
    found = codec.decompress(made, data[: len(data) - prefix], resolution=resolution)
    times = {2: 2, 4: 1}[resolution]
    for image, coarse in zip(images, found, strict=True):
        x = image[None].long()
        for _ in range(times):
            _, x = pyramid.haar.lift(x)
        assert torch.equal(coarse, x[0].to(torch.uint8))


def test_coarse_images_of_an_exact_pyramid_are_refused():
    made = model()
    data = codec.compress(made, smooth(2, 4), steps=2)
    with pytest.raises(UserError, match="one stack"):
        codec.decompress(made, data, resolution=2)


def test_threads_and_training_mode_are_of_no_influence():
    made, images = model(field=RESIDUAL), smooth(6, 8)
    threads = torch.get_num_threads()
    files = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        files.append(codec.compress(made.train(count == 2), images, steps=STEPS))
        assert torch.get_num_threads() == count and made.training == (count == 2)
        torch.set_num_threads(4)
        assert same(codec.decompress(made, files[0]), list(images))
    torch.set_num_threads(threads)
    assert files[0] == files[1] == files[2]


def test_images_that_do_not_come_back_are_stored(monkeypatch):
    made, images = model(), list(smooth(5, 4))
    calls = []

    def pop_images(*args, **kwargs):
        calls.append(args)
        found = real_pop(*args, **kwargs)
        if len(calls) == 1:
            found[2] = found[2] + 1
        return found

    real_pop = lane.pop_images
    monkeypatch.setattr(lane, "pop_images", pop_images)
    coded = codec.encode(made, images, steps=2)
    assert coded.stored >= 1 and len(calls) == 2
    assert container.unpack(coded.data).entries[2].stored
    assert same(codec.decompress(made, coded.data), images)


def test_images_that_cannot_be_coded_are_stored():
    """A network whose answers are not finite for some images."""
    made = model()
    images = [*smooth(20, 4), torch.full((1, 4, 4), 255, dtype=torch.uint8)]
    level = made.level(4)
    right = level.condition

    def condition(coarse):
        found = right(coarse)
        bright = coarse.flatten(1).amin(1) > 0.99
        return found.masked_fill(bright[:, None, None, None], float("nan"))

    level.condition = condition
    coded = codec.encode(made, images, steps=2, bound=False)
    entries = container.unpack(coded.data).entries
    assert coded.stored == 1 and entries[-1].stored
    assert same(codec.decompress(made, coded.data), images)


def test_other_models_are_refused():
    data = codec.compress(model(), smooth(2, 4), steps=2)
    with pytest.raises(UserError, match="another model"):
        codec.decompress(model(size=0.11), data)


def test_images_and_models_that_do_not_fit_are_refused():
    made = model()
    for wrong, message in (
        (torch.zeros(1, 1, 4, 4), "uint8"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "built for 1"),
        ([torch.zeros(4, 4, dtype=torch.uint8)], r"\(C, H, W\)"),
    ):
        with pytest.raises(UserError, match=message):
            codec.compress(made, wrong)
    with pytest.raises(UserError, match="names"):
        codec.compress(made, smooth(2, 4), names=["one"])
    with pytest.raises(UserError, match="logit"):
        codec.compress(model(base="logit"), smooth(40, 4), steps=2)
    with pytest.raises(UserError, match="drops the others"):
        codec.compress(model(nbits=5), smooth(1, 4))


def test_settings_are_checked():
    made = model()
    table = default(made).table()
    assert Settings.from_table(table, made) == default(made)
    for change in ({"bits": 99}, {"bits": True}, {"levels": {}}, {"levels": {"2": {}, "4": {}}}):
        with pytest.raises(UserError):
            Settings.from_table(table | change, made)
    for wrong in ({"steps": 0}, {"steps": 2.5}, {"sigma": float("nan")}, {"method": "magic"}):
        with pytest.raises(UserError):
            LevelSettings(**wrong)


DECODE = f"""
import sys; sys.path[:0] = {[os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]}
import torch; torch.set_num_threads(2)
from pathlib import Path
from test_codec import MODELS, model, same
from mrcnf import codec
made = model(**MODELS[sys.argv[1]])
for path in sorted(Path.cwd().glob("*.mrc")):
    images = torch.load(path.with_suffix(".pt"))
    assert same(codec.decompress(made, path.read_bytes()), images), path
"""


def decode_elsewhere(folder, name, files):
    """A fresh process decodes files of a model of `MODELS` and compares what comes out."""
    for number, (data, images) in enumerate(files):
        (folder / f"{number}.mrc").write_bytes(data)
        torch.save([image.clone() for image in images], folder / f"{number}.pt")
    subprocess.run([sys.executable, "-c", DECODE, name], cwd=folder, check=True)


def test_another_process_decodes_it(tmp_path):
    images = smooth(3, 8)
    data = codec.compress(model(**MODELS["two blocks"]), images, steps=STEPS)
    decode_elsewhere(tmp_path, "two blocks", [(data, images)])


@pytest.mark.slow
@EVERY
def test_many_images_come_back_in_another_process(name, tmp_path):
    """For each model a thousand in one file, and single ones; eleven thousand in all."""
    made = model(**MODELS[name])
    channels, side = made.config.channels, made.config.finest
    many = [
        *noise(300, side, channels), *smooth(620, side, channels),
        *(image for _ in range(10) for image in assorted(channels, side)),
    ]  # fmt: skip
    assert len(many) >= 1000
    files = [many, *([image] for image in assorted(channels, side))]
    coded = [
        codec.encode(made, images, steps=STEPS, verify=False, bound=False) for images in files
    ]
    assert not any(found.stored for found in coded)
    pairs = [(found.data, images) for found, images in zip(coded, files, strict=True)]
    decode_elsewhere(tmp_path, name, pairs)
