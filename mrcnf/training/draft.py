"""A first configuration for somebody's own images: fit to them, to the machine and to a time."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mrcnf import runtime
from mrcnf.data.datasets import Images, load
from mrcnf.data.folders import photographs
from mrcnf.errors import UserError
from mrcnf.runs.config import Config, from_table
from mrcnf.runs.images import open_images
from mrcnf.runs.settings import DataConfig
from mrcnf.training.trainer import Trainer

CROPS = 20_000
"""Training crops that a folder's photographs are cut into, about."""
MANY = 100
"""Photographs of which some may be hardly larger than a crop."""
EPOCHS = 200
"""Longest training: so often each image is seen, whatever the time."""
MEASURED = 6
"""Steps of each level that its pace is measured on, after two that are not."""

TEMPLATE = """\
# {images}.
# Train with it: mrcnf train {name}.toml
# Every setting, with its default where none is given here: mrcnf train {name}.toml --dry-run
name = {quoted}  # the run's folder is runs/{name}

[data]
{data}

[model]
# Sides of the images in pixels, coarsest first, each twice the last.
# A trained model grows: mrcnf extend runs/{name} --resolution {next}
resolutions = {resolutions}

[field]
# The network of each level: wider and deeper ones learn more, in more time.
width = {width}
depth = {depth}

[train]
batch = {batch}  # images in a step
warmup = {warmup}  # steps in which the learning rate rises
ema = {ema}  # decay of the averaged weights, which are those that are kept
# evaluate_every = {every}  # steps between notes of bits/dim on test images, beside the time
# compile = true  # faster after the first minute; on a CPU it needs a C++ compiler
{levels}
[solver]
# Of evaluation and sampling; mrcnf evaluate RUN --convergence says whether steps are enough.
method = "midpoint"
steps = 20
spacing = 3.0

[evaluate]
limit = {tested}  # test images, the first so many; 0 takes all
"""
CUT = """\
# Each photograph is cut into at most so many squares of {side}×{side} pixels, at its own
# resolution; 0 would take its central square, shrunk to that size.
crop = {crop}"""


@dataclass(frozen=True)
class Draft:
    """A configuration, as text with comments, and what was found out on the way."""

    text: str
    config: Config
    images: str
    """What there is to train and to test on."""
    seconds: dict[int, float]
    """A step's, by level, as measured."""

    @property
    def minutes(self) -> float:
        """What training all levels will take, one after another, if the pace stays as it was."""
        return sum(s * self.config.at_level(r).train.steps for r, s in self.seconds.items()) / 60


def draft(
    name: str, data: DataConfig, resolutions: Sequence[int] = (), minutes: float = 20.0
) -> Draft:
    """A configuration for images, of which so many `minutes` of training come out.

    The finest resolution is at most 32 on a CPU and 64 on a GPU unless `resolutions` are given, and
    of a few photographs at most half of the smallest side, but of an npy file its own. Photographs
    of a folder are always cut into crops. The networks grow with the number of images. Steps are
    what fits into the minutes, the finer levels getting more, at a pace that is measured by
    training each level for a few steps.

    Raises:
        UserError: there are no such images, or too few or too small ones; or the name or the
            resolutions do not do.
    """
    if not minutes > 0 or not math.isfinite(minutes):
        raise UserError(f"--minutes {minutes:g}: must be more than 0")
    on_gpu = torch.cuda.is_available()
    what, smallest, most = "", 0, 64 if on_gpu else 32
    if data.name.startswith("npy:"):
        most = load(data.name).shape[-1]  # files have one resolution
    if data.name.startswith("folder:"):
        what, smallest, count = _photographs(data.name)
        # Of a few test photographs each should give several crops.
        smallest = smallest if count >= MANY else max(1, smallest // 2)
        if not data.crop:
            data = dataclasses.replace(data, crop=_rounded(CROPS / count, 1))
    table = {"name": name, "data": dataclasses.asdict(data)}
    chosen = tuple(resolutions) or _resolutions(smallest or most, most)
    config = from_table(table | {"model": {"resolutions": list(chosen)}}, f"mrcnf new {name}")
    train = open_images(config.data, config.model, "train")
    test = open_images(config.data, config.model, "test")
    if len(test) < 2 or len(train) < 2:
        raise UserError(
            f"{data.name} gives {len(train)} training and {len(test)} test images of {chosen[-1]}×"
            f"{chosen[-1]}, and at least 2 of either are needed; add some, or give smaller "
            "--resolutions"
        )
    images = _describe(what, train, test)
    settings = _settings(len(train), len(test), on_gpu)
    some = _text(config, settings, dict.fromkeys(chosen, 1000), images)
    seconds = _pace(from_table(tomllib.loads(some)), train)
    shares = {r: i + 1 for i, r in enumerate(chosen)}
    longest = EPOCHS * len(train) / settings["batch"]
    steps = {
        r: _rounded(min(longest, minutes * 60 * shares[r] / sum(shares.values()) / s), 20)
        for r, s in seconds.items()
    }
    text = _text(config, settings, steps, images)
    return Draft(text, from_table(tomllib.loads(text)), images, seconds)


def _photographs(name: str) -> tuple[str, int, int]:
    """What a folder holds, in words; its smallest side in pixels; and how many."""
    found = photographs(Path(name.partition(":")[2]).expanduser())
    shapes = sorted((h * w, w, h) for _, h, w in found.values())
    if len(shapes) < 2:
        raise UserError(f"{name} holds one photograph, and one must be kept for testing; add some")
    sizes = " to ".join(f"{w}×{h}" for _, w, h in dict.fromkeys((shapes[0], shapes[-1])))
    return f"{len(shapes)} photographs of {sizes}", min(min(s[1:]) for s in shapes), len(shapes)


def _resolutions(smallest: int, most: int) -> tuple[int, ...]:
    """Powers of two up to the smaller of the two."""
    finest = 2 ** (min(most, smallest).bit_length() - 1)
    if finest < 4:
        raise UserError(
            "the smallest photograph has a side of less than 8 pixels, or all images one of less "
            "than 4; remove it, or give --resolutions"
        )
    coarsest = min(8, finest // 2)
    return tuple(2**k for k in range(coarsest.bit_length() - 1, finest.bit_length()))


def _describe(what: str, train: Images, test: Images) -> str:
    def one(images: Images) -> str:
        _, channels, height, width = images.shape
        kind = "grey" if channels == 1 else "colour"
        groups = images.groups
        count = 0 if groups is None else len(groups.unique())
        of = f" from {count} photograph{'s' * (count > 1)}" if count else ""
        return f"{len(images):,} {kind} images of {width}×{height}{of}"

    return f"{what + ': ' if what else ''}{one(train)} to train on, {one(test)} to test"


def _settings(train: int, test: int, on_gpu: bool) -> dict[str, int]:
    small = train < 5000
    return {
        "width": (64 if small else 96) if on_gpu else (32 if small else 48),
        "depth": 3 if small else 4,
        "batch": min(64, 2 ** (train.bit_length() - 1)),
        "tested": 2000 if test > 2000 else 0,
    }


def _rounded(number: float, least: int) -> int:
    """Down to two digits."""
    count = max(least, int(number))
    unit = 10 ** max(0, len(str(count)) - 2)
    return count // unit * unit


def _pace(config: Config, images: Images) -> dict[int, float]:
    """Seconds of a step of each level: the median of some."""
    seconds: dict[int, float] = {}
    device = runtime.choose_device(config.train.device)
    for resolution in config.model.resolutions:
        with tempfile.TemporaryDirectory() as folder:
            trainer, laps = Trainer(config, resolution, images, Path(folder)), []
            for _ in range(MEASURED + 2):
                started = time.perf_counter()
                trainer.step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                laps.append(time.perf_counter() - started)
        seconds[resolution] = sorted(laps[2:])[MEASURED // 2]
    return seconds


def _text(config: Config, settings: dict[str, int], steps: dict[int, int], images: str) -> str:
    data, most = config.data, max(steps.values())
    own = [f"name = {_quoted(data.name)}"]
    own += [f"root = {_quoted(data.root)}"] if data.root else []
    own += [f"limit = {data.limit}"] if data.limit else []
    own += ["download = true"] if data.download else []
    own += [CUT.format(side=config.model.finest, crop=data.crop)] if data.crop else []
    if data.options:
        import tomli_w  # as in runs.config

        own += ["", tomli_w.dumps({"data": {"options": data.options}}).rstrip()]
    return TEMPLATE.format(
        images=images,
        name=config.name,
        quoted=_quoted(config.name),
        data="\n".join(own),
        resolutions=list(config.model.resolutions),
        next=2 * config.model.finest,
        warmup=max(1, min(100, most // 10)),
        ema=0.999 if most >= 3000 else 0.99,
        every=max(1, most // 5),
        levels="".join(f"\n[level.{r}.train]\nsteps = {n}\n" for r, n in steps.items()),
        **settings,
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # TOML's basic strings are as JSON's
