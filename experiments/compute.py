"""Bits per dimension of CIFAR-10 against what training cost, in core-minutes and in FLOP.

    python -m experiments.compute count RUN|RECIPE.toml...     the FLOP of their training, by level
    python -m experiments.compute plot --out docs/compute.png  the points of compute.json

FLOP are those of the networks' convolutions and matrix products, forwards and backwards, in one
training step, two a multiplication, as PyTorch counts them, times the steps. The optimiser's own
matrix products are left out. Of other people's models, compute.json has what they
publish; GPU-hours become FLOP only as an upper limit, at the card's peak rate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from benchmarks.machine import flop
from mrcnf import seeds
from mrcnf.data import Images
from mrcnf.model.level import Level
from mrcnf.report.plot import COLOURS, DPI
from mrcnf.runs import checkpoint, config, metrics
from mrcnf.training.objectives import Objective
from mrcnf.training.prepare import prepare_level

Trained = tuple[Level, config.Config, dict[str, float]]
"""A level, how it is trained, and the last line of its log."""
POINTS = Path(__file__).with_name("compute.json")


def count(what: Path) -> None:
    """Print what a run took, or what a recipe of so many steps takes."""
    total = minutes = 0.0
    for level, settings, last in _of_recipe(what) if what.suffix == ".toml" else _of_run(what):
        each = _of_a_step(level, settings)
        total += each * last["step"]
        minutes += last.get("seconds", 0.0) / 60
        print(
            f"{what} level {level.resolution}: {last['step']:,.0f} steps of {each:.3g} FLOP, "
            f"{each * last['step']:.3g}"
        )
    print(f"{what}: {total:.3g} FLOP" + (f", {minutes:.1f} core-minutes" if minutes else ""))


def _of_run(run: Path) -> Iterator[Trained]:
    for resolution, metadata in checkpoint.describe(run).items():
        folder = checkpoint.level_folder(run, resolution)
        settings = config.load(folder / checkpoint.CONFIG).at_level(resolution)
        # A new one, as it was trained, when there may have been no finer levels yet.
        level = _fresh(settings, resolution, metadata["model"]["channels"])
        yield level, settings, metrics.read(folder)[-1]


def _of_recipe(recipe: Path) -> Iterator[Trained]:
    whole = config.load(recipe)
    for resolution in whole.model.resolutions:
        settings = whole.at_level(resolution)
        if settings.train.minutes:
            raise SystemExit(f"{recipe} trains by the clock: count the run that it made")
        level = _fresh(settings, resolution, settings.model.channels or 3)
        yield level, settings, {"step": settings.train.steps}


def _fresh(settings: config.Config, resolution: int, channels: int) -> Level:
    images = Images(_pixels(settings, settings.model.finest, channels), "random", "train")
    return prepare_level(settings, resolution, images)


def _of_a_step(level: Level, settings: config.Config) -> int:
    objective = Objective(level.train().requires_grad_(), settings)
    pixels = _pixels(settings, level.model.finest, level.model.channels)
    generator = seeds.generator(0)
    return flop(lambda: objective(pixels, generator)[0].backward())


def _pixels(settings: config.Config, side: int, channels: int) -> Tensor:
    """A batch; what is in it does not matter."""
    shape = settings.train.batch, channels, side, side
    return torch.randint(256, shape, dtype=torch.uint8, generator=seeds.generator(0))


def plot(out: Path) -> None:
    points: list[dict[str, Any]] = json.loads(POINTS.read_text(encoding="utf-8"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for point in points:
        ours = "core_minutes" in point
        colour = COLOURS[0] if ours else COLOURS[1]
        for axes, key in ((left, "core_minutes"), (right, "flop")):
            if key not in point:
                continue
            x, bits = point[key], point["bits"]
            marker = "o" if ours else "s"
            axes.errorbar(
                x, bits, yerr=point.get("error"), fmt=marker, color=colour, markersize=5, capsize=2
            )
            if point.get("at_most"):
                axes.annotate(
                    "", (x / 4, bits), (x, bits), arrowprops={"arrowstyle": "->", "color": colour}
                )
            place = point.get("place", [6, 4])
            axes.annotate(
                point["name"], (x, bits), place, textcoords="offset points", fontsize=8,
                ha="left" if place[0] > 0 else "right",
            )  # fmt: skip
    left.set_xlabel("training, minutes of one CPU core")
    right.set_xlabel("training, FLOP (arrows: at most, from GPU-hours at peak rate)")
    left.set_ylabel("bits/dim of CIFAR-10 test images")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.margins(x=0.35, y=0.08)
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    counting = commands.add_parser("count")
    counting.add_argument("runs", type=Path, nargs="+")
    plotting = commands.add_parser("plot")
    plotting.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "plot":
        plot(options.out)
    else:
        for run in options.runs:
            count(run)


if __name__ == "__main__":
    main()
