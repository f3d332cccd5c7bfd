"""The table of `splits.sh`: what each way to split is worth, over the same images and noise.

    python experiments/splits.py runs/splits --root DIR [--limit 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import mrcnf
from mrcnf.measure.evaluate import level_bits, mean_and_error
from mrcnf.model.level import Level
from mrcnf.runs import checkpoint
from mrcnf.runs.extend import finest_config
from mrcnf.training.objectives import Objective

ROWS = (
    "none", "random", "learned", "entropy", "entropy-once", "context", "conditional", "continuous"
)  # fmt: skip
LAPS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of runs named ROW-SEED")
    parser.add_argument("--root", default="", help="where CIFAR-10 is")
    parser.add_argument("--limit", type=int, default=1000, help="test images, the first ones")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    images = mrcnf.data.load("cifar10", "test", root=options.root).pixels[: options.limit]
    found = {row: sorted(options.runs.glob(f"{row}-[0-9]")) for row in ROWS}
    found = {row: paths for row, paths in found.items() if paths}
    bits = {
        row: torch.stack([level_bits(checkpoint.load_level(run, 32), images) for run in paths])
        for row, paths in found.items()
    }
    times = step_seconds({row: paths[0] for row, paths in found.items()}, images)
    table = []
    for row, paths in found.items():
        parameters = checkpoint.describe(paths[0])[32]["parameters"]
        table.append(
            {"row": row, "seeds": len(paths), "parameters": parameters, "step_seconds": times[row]}
            | summary(bits[row], bits["none"] if row != "none" else None)
        )
        print(line(table[-1], times["none"]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


def summary(bits: Tensor, base: Tensor | None) -> dict[str, object]:
    """Means and errors of bits (seeds, images), and of differences where seeds are shared."""
    mean, error = mean_and_error(bits.mean(0), None)
    result: dict[str, object] = {"bpd": mean, "bpd_stderr": error}
    if base is None or len(base) != len(bits):
        return result
    difference = bits - base
    mean, error = mean_and_error(difference.mean(0), None)
    by_seed = difference.mean(1)
    return result | {
        "difference": mean,
        "difference_stderr_images": error,
        "difference_stderr_seeds": float(by_seed.std() / math.sqrt(len(by_seed))),
        "difference_by_seed": by_seed.tolist(),
    }


def step_seconds(runs: dict[str, Path], images: Tensor) -> dict[str, float]:
    """Median seconds of a forward and a backward pass on a batch, the rows taking turns."""
    works: dict[str, tuple[Level, Objective, int]] = {}
    for row, run in runs.items():
        level = checkpoint.load_level(run, 32).train().requires_grad_(True)
        config = finest_config(run).at_level(32)
        works[row] = level, Objective(level, config), config.train.batch
    seconds: dict[str, list[float]] = {row: [] for row in works}
    for lap in range(LAPS + 1):
        for row, (level, objective, batch) in works.items():
            generator = torch.Generator().manual_seed(lap)
            level.zero_grad()
            started = time.perf_counter()
            loss, _ = objective(images[:batch], generator)
            loss.backward()
            if lap:  # the first round warms up
                seconds[row].append(time.perf_counter() - started)
    return {row: statistics.median(values) for row, values in seconds.items()}


def line(row: dict[str, object], base: float) -> str:
    text = (
        f"| {row['row']} | {row['parameters']:,} | {1000 * row['step_seconds']:.0f} ms "  # type: ignore[operator]
        f"({row['step_seconds'] / base:.2f}) | {row['bpd']:.4f} ± {row['bpd_stderr']:.4f} |"  # type: ignore[operator]
    )
    if "difference" not in row:
        return f"{text} | |"
    seeds = ", ".join(f"{value:+.4f}" for value in row["difference_by_seed"])  # type: ignore[attr-defined]
    return (
        f"{text} {row['difference']:+.4f} ± {row['difference_stderr_images']:.4f} ± "
        f"{row['difference_stderr_seeds']:.4f} | {seeds} |"
    )


if __name__ == "__main__":
    main()
