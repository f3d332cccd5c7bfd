"""Two figures of what codec.sh measured: excess against steps, time against size.

    python experiments/codec_figures.py runs/codec [--out docs]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from mrcnf.report.plot import COLOURS, DPI

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, help="folder of codec.sh's numbers")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    excess(_rows(options.measured / "steps.json"), options.out / "codec-steps.png")
    times(_rows(options.measured / "sizes.json"), options.out / "codec-size.png")


def _rows(path: Path) -> Rows:
    return [row for row in json.loads(path.read_text()) if "steps" in row]


def excess(rows: Rows, path: Path) -> None:
    """What files take over the model's bound, by the number of steps."""
    steps, axis = [row["steps"] for row in rows], _axis("steps of a flow", "over the bound, %")
    series = (
        ("overhead_percent", "whole file", "o-"),
        ("excess_percent", "without the beginning", "s--"),
    )
    for number, (key, label, line) in enumerate(series):
        axis.plot(steps, [row[key] for row in rows], line, color=COLOURS[number], label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(steps, [str(n) for n in steps])
    axis.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axis.minorticks_off()
    first = rows[0]
    axis.set_title(f"{first['count']} images of {first['width']}×{first['height']}", fontsize=10)
    _write(axis, path)


def times(rows: Rows, path: Path) -> None:
    """How long one image takes, by the number of its pixels."""
    pixels = [row["height"] * row["width"] for row in rows]
    axis = _axis("pixels", "seconds")
    for number, (key, line) in enumerate((("writing", "o-"), ("reading", "s--"))):
        axis.plot(pixels, [row[key] for row in rows], line, color=COLOURS[number], label=key)
    middle = len(rows) // 2
    linear = [rows[middle]["writing"] * n / pixels[middle] for n in pixels]
    axis.plot(pixels, linear, ":", color="grey", label="in proportion")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(pixels, [f"{row['width']}×{row['height']}" for row in rows])
    axis.set_yticks([1, 10, 100], ["1", "10", "100"])
    axis.minorticks_off()
    axis.set_title(f"one photograph alone, {rows[0]['steps']} steps", fontsize=10)
    _write(axis, path)


def _axis(across: str, up: str) -> Axes:
    _, axis = plt.subplots(figsize=(4.2, 3.2), dpi=DPI)
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.3)
    return axis


def _write(axis: Axes, path: Path) -> None:
    axis.legend(frameon=False)
    axis.figure.savefig(path, bbox_inches="tight")
    plt.close()
    print(path)


if __name__ == "__main__":
    main()
