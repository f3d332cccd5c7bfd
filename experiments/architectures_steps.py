"""How many steps six core-minutes are, for every row of `architectures-rows.sh`.

    python -m experiments.architectures_steps --root DIR [--minutes 6]

Steps rather than `train.minutes`, which counts the wall's minutes: the processor's own time is the
same whatever else the machine does. Every level of every row is trained for a few steps, taking
turns, compiled beforehand; shuffles take as many steps as the plain split.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import mrcnf
from mrcnf.runs import config
from mrcnf.training.trainer import Trainer

HERE = Path(__file__).parent
MINUTES = 6.0
SHARES = {1: (1.0,), 2: (1 / 3, 2 / 3), 3: (1 / 12, 1 / 4, 2 / 3)}
"""Of a pyramid's minutes by level, the base first."""
LAPS = 7


def rows_of(size: str) -> list[str]:
    """The names of all rows, of size cpu or gpu."""
    return _said(size)


def settings_of(size: str, row: str) -> list[str]:
    """What a row sets."""
    return _said(size, row)


def _said(*words: str) -> list[str]:
    command = ["sh", str(HERE / "architectures-rows.sh"), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--root", default="", help="where CIFAR-10 is")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    options = parser.parse_args()
    rows = options.rows or [
        row for row in rows_of("cpu") if not row.startswith("coupling-split-")
    ]  # fmt: skip
    images = mrcnf.data.load("cifar10", "train", root=options.root)
    with tempfile.TemporaryDirectory() as folder:
        works: dict[tuple[str, int], Trainer] = {}
        for row in rows:
            recipe = config.load(HERE / "architectures.toml", settings_of("cpu", row))
            for resolution in recipe.model.resolutions:
                run = Path(folder) / row
                trainer = Trainer(recipe, resolution, images, run, pixels=images.pixels)
                trainer.step()
                works[row, resolution] = trainer
                print(f"{row}, level {resolution}: compiled", flush=True)
        seconds: dict[tuple[str, int], list[float]] = {name: [] for name in works}
        for _ in range(LAPS):
            for name, trainer in works.items():
                started = time.process_time()
                trainer.step()
                seconds[name].append(time.process_time() - started)
    for (row, resolution), trainer in works.items():
        levels = trainer.config.model.resolutions
        minutes = options.minutes * SHARES[len(levels)][levels.index(resolution)]
        each = statistics.median(seconds[row, resolution])
        parameters = sum(p.numel() for p in trainer.level.parameters())
        print(
            f"{row}, level {resolution}: {parameters:,} parameters, {1000 * each:.0f} ms a step "
            f"({1000 * min(seconds[row, resolution]):.0f} at best): {60 * minutes / each:.0f} steps"
        )


if __name__ == "__main__":
    main()
