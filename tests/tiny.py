"""Tiny configurations, images and runs that the tests share."""

import json

import numpy as np
import torch

from mrcnf.data.datasets import Images
from mrcnf.runs import config
from mrcnf.training import trainer as train

TINY = """\
name = "tiny"
[data]
name = "{data}"
[model]
resolutions = [2, 4]
[field]
width = 4
depth = 1
[train]
steps = 4
batch = 4
warmup = 1
log_every = 1
checkpoint_every = 2
device = "cpu"
[train_solver]
method = "midpoint"
steps = 2
[solver]
steps = 3
[evaluate]
limit = 0
batch = 5
"""


def tiny(*overrides, data="photos"):
    """A configuration of two levels, 2 and 4, that trains within a second."""
    table = config.tomllib.loads(TINY.format(data=data))
    return config.from_table(config.override(table, overrides))


def smooth_images(count=12, channels=1, side=4, seed=0):
    """Noisy gradients: something to learn, uint8 (count, channels, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(60, 180, side)
    noise = torch.randn(count, channels, side, side, generator=generator)
    shift = 25 * torch.randn(count, 1, 1, 1, generator=generator)
    return (ramp[None, None, None] + shift + 8 * noise).clamp(0, 255).to(torch.uint8)


def images(count=12, channels=1, side=4, seed=0):
    return Images(smooth_images(count, channels, side, seed), "generated", "train")


def write_npz(folder, channels=1, side=4, count=12):
    """A folder for `npz:` with a train and a test split; returns the data's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("train", "test")):
        pixels = smooth_images(count, channels, side, seed).permute(0, 2, 3, 1).numpy()
        np.savez(folder / f"{split}.npz", images=pixels)
    return f"npz:{folder}"


def trained(run, *overrides, data=None, level=None, resume=False):
    """Train levels (both, or one) into a run folder without a configuration file."""
    settings, data = tiny(*overrides), data or images()
    for resolution in [level] if level else settings.model.resolutions:
        trainer = train.Trainer(settings, resolution, data, run, resume)
        trainer.run(progress=False)
    return run


def metrics(run, level):
    """The lines of metrics.jsonl without what the clock decides."""
    lines = (run / f"level-{level}" / "metrics.jsonl").read_text().splitlines()
    clock = {"seconds", "images_per_s"}
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def files(folder):
    """Every file below a folder, with its bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
