"""Portable files of tiny models, written once, and the images that they must give for ever.

`python tests/codec/test_golden.py --write NAME...` writes models, files and images of these names
anew, which a change of the format or of `codec.portable` asks for. `exact` has learned noise of an
earlier version, without links, which no present one writes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mrcnf
from mrcnf import codec
from mrcnf.codec import container
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, FlowConfig, ModelConfig
from mrcnf.runs import calibration, checkpoint
from mrcnf.runs.tensors import read_tensors, write_tensors

GOLDEN = Path(__file__).parent / "golden/portable"
IMAGES = GOLDEN / "images.npz"
STEPS = 2
SPLIT = {"kind": "coupling", "couplings": 1, "splits": 1, "shuffle": "context"}
MODELS = {
    "exact": ((4, 8), {"channels": 1, "dequantisation": "variational"}, {}),
    "linked": ((4, 8), {"channels": 3, "dequantisation": "variational"}, {}),
    "integer": ((4, 8), {"pyramid": "integer", "channels": 3, "dequantisation": "gaussian"}, {}),
    "couplings": ((8,), {"channels": 1}, {**SPLIT, "prior": "conditional"}),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def expected(name):
    """The images of a file, in their order."""
    with np.load(IMAGES) as archive:
        return [torch.from_numpy(x) for size in ("first", "others")
                for x in archive[f"{name}-{size}"]]


def same(found, name):
    wanted = expected(name)
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@EVERY
def test_golden_files_give_their_images(name):
    found = codec.decompress(mrcnf.load(GOLDEN / name), (GOLDEN / f"{name}.mrc").read_bytes())
    assert same(found, name)


@pytest.mark.slow
@EVERY
def test_golden_images_give_their_files(name):
    model = mrcnf.load(GOLDEN / name)
    data = codec.compress(model, expected(name), steps=STEPS, portable=True)
    assert data == (GOLDEN / f"{name}.mrc").read_bytes()


@pytest.mark.slow
def test_other_processors_decode_golden_files():
    """As far as libraries let themselves be told that they run on one."""
    old = {
        "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "OPENBLAS_CORETYPE": "Prescott",
    }  # fmt: skip
    script = "import test_golden as t; [t.test_golden_files_give_their_images(n) for n in t.MODELS]"
    for change in ({}, old):
        subprocess.run(
            [sys.executable, "-c", script], cwd=Path(__file__).parent, env={**os.environ, **change},
            check=True
        )


def build(name):
    """A model of random weights, in units of random images."""
    resolutions, config, flow = MODELS[name]
    torch.manual_seed(0)
    model = ModelConfig(resolutions=resolutions, **config)
    levels = []
    for resolution in resolutions:
        field = FieldConfig(width=4, depth=1, lattice=name == "exact" and resolution == 8)
        levels.append(Level(model, resolution, field, flow=FlowConfig(**flow)))
    x, _ = dequantise(images(64, model.finest, model.channels, spread=128))
    for level in levels:
        level.fit_standardisation(x)
    if name == "exact":
        for field in calibration.fields_of(levels[0]):
            field.near = field.new_near()
    with torch.no_grad():
        for parameter in (made := MultiResolutionFlow(levels)).parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return made


def images(count, side, channels, spread):
    """Noisy gradients."""
    ramp = torch.linspace(60, 180, side)
    noise = torch.rand(count, channels, side, side) - 0.5
    return (ramp + 2 * spread * noise).clamp(0, 255).to(torch.uint8)


def small(tensor):
    """In few bytes: of weights, that are random anyway, three digits are enough."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float8_e4m3fn if tensor.numel() > 30 else torch.float16)


def write(names):
    """Models, files and images."""
    with np.load(IMAGES) as archive:
        found = dict(archive)
    for name in names:
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        made = build(name)
        for level in made:
            folder = checkpoint.level_folder(GOLDEN / name, level.resolution)
            folder.mkdir(parents=True)
            weights = {n: small(t) for n, t in level.state_dict().items() if ".near." not in n}
            checkpoint.save_level(folder, level, weights, {})
            if any(field.near is not None for field in calibration.fields_of(level)):
                calibration.save(folder, level)
                heads, metadata = read_tensors(folder / calibration.HEADS)
                heads = {n: small(t) for n, t in heads.items()}
                write_tensors(folder / calibration.HEADS, heads, metadata)
        channels = made.config.channels
        # Noise comes first: after it there are bits for coding the others at full accuracy.
        first, others = images(1, 20, channels, 128)[..., :15], images(7, 8, channels, 10)
        found |= {f"{name}-first": first.numpy(), f"{name}-others": others.numpy()}
        data = codec.compress(
            mrcnf.load(GOLDEN / name), [*first, *others], steps=STEPS, portable=True
        )
        assert not min(container.unpack(data).settings["rungs"].popitem()[1])
        (GOLDEN / f"{name}.mrc").write_bytes(data)
    np.savez_compressed(IMAGES, **found)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"] or not set(sys.argv[2:]) <= MODELS.keys():
        sys.exit(__doc__)
    write(sys.argv[2:])
