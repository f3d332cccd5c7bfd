"""Bits per dimension of CIFAR-10 against what training cost, in core-minutes and in FLOP.

    python -m experiments.compute count RUN...                 the FLOP of trained runs, by level
    python -m experiments.compute plot --out docs/compute.png  the points of compute.json

FLOP are those of the networks' convolutions and matrix products, forwards and backwards, in one
training step, two a multiplication, as PyTorch counts them, times the steps. The optimiser's own
matrix products are left out. Of other people's models, compute.json has what they
publish; GPU-hours become FLOP only as an upper limit, at the card's peak rate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from benchmarks.machine import flop
from mrcnf import seeds
from mrcnf.report.plot import COLOURS, DPI
from mrcnf.runs import checkpoint, config, metrics
from mrcnf.training.objectives import Objective

POINTS = Path(__file__).with_name("compute.json")


def count(run: Path) -> None:
    total = minutes = 0.0
    for level in checkpoint.load(run).levels:
        folder = checkpoint.level_folder(run, level.resolution)
        settings = config.load(folder / checkpoint.CONFIG).at_level(level.resolution)
        images = torch.zeros(
            settings.train.batch, level.model.channels, *2 * (level.model.finest,),
            dtype=torch.uint8,
        )  # fmt: skip
        objective = Objective(level.train().requires_grad_(), settings)
        generator = seeds.generator(0)
        each = flop(lambda o=objective, x=images, g=generator: o(x, g)[0].backward())  # type: ignore[misc]
        last = metrics.read(folder)[-1]
        total += each * last["step"]
        minutes += last["seconds"] / 60
        print(
            f"{run} level {level.resolution}: {last['step']:,.0f} steps of {each:.3g} FLOP, "
            f"{each * last['step']:.3g} in {last['seconds'] / 60:.1f} minutes"
        )
    print(f"{run}: {total:.3g} FLOP, {minutes:.1f} core-minutes")


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
        axes.margins(x=0.25, y=0.08)
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
