"""Measures one row of `architectures.sh`, part by part; what is measured already is left alone.

    python -m experiments.architectures RUN --root DIR [--parts bits cost codec ood attack]
    python -m experiments.architectures RUN --root DIR --parts controls --transfer RUN

RUN/measured.json holds a table per part, with numbers of each image, so that rows can be compared
image by image. Every row has the same images and, pixel by pixel, the same noise. Times are of the
processor; continuous flows are attacked, and scored for `ood`, in fewer steps of their solver.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mrcnf
from benchmarks.timing import peak_bytes
from mrcnf import codec, files
from mrcnf.measure import ood
from mrcnf.measure.attack import attack, random_signs
from mrcnf.measure.classical import bits_of_files
from mrcnf.measure.evaluate import bits_by_level
from mrcnf.measure.robustness import robustness
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.runs import checkpoint, config
from mrcnf.training.objectives import Objective

TESTED, SCORED, CODED, SAMPLED = 500, 200, 20, 16
ATTACKED, GRADIENTS, EPSILONS = 32, 10, (2, 8)
FEWER = 10
"""Steps of a continuous flow's solver where it is attacked or scored."""
CONTROLS_EPSILON = 4
CONTROLS = {False: (16, (1, 4, 16, 64, 256)), True: (4, (1, 4, 16, 64))}
"""What shows that the attack is one: images, and numbers of steps, by whether flows are solved."""
PATCHES = (1, 2, 4, 8, 16)
"""Sides in pixels of what is shuffled, as in the appendix of arXiv 2106.08462."""
PROGRESS = sys.stderr.isatty()
Part = Callable[["Row"], dict[str, Any]]


class Row:
    """A trained row, and the images that it is measured on."""

    def __init__(self, run: Path, root: str, transfer: Path | None = None) -> None:
        self.run, self.root, self.transfer = run, root, transfer
        self.model: MultiResolutionFlow = mrcnf.load(run)
        self.test = mrcnf.data.load("cifar10", "test", root=root).pixels[:TESTED]
        self.solved = any(level.flow.solved for level in self.model)

    def coarsely(self) -> list[Level]:
        """The levels, those of continuous flows to be solved in `FEWER` steps from now on."""
        return _coarsely(self.model)


def _coarsely(model: MultiResolutionFlow) -> list[Level]:
    for level in model:
        level.solver = replace(level.solver, steps=FEWER)
    return list(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--root", default="", help="where CIFAR-10 and CIFAR-100 are")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=ALWAYS)
    parser.add_argument("--transfer", type=Path, help="the run that `controls` attacks through too")
    options = parser.parse_args()
    path = options.run / "measured.json"
    for name in options.parts:
        if name in _measured(path):
            continue
        started = time.process_time()
        table = PARTS[name](Row(options.run, options.root, options.transfer))
        table["core_seconds"] = time.process_time() - started
        # Read again: other parts may be measured at the same time.
        files.write(path, json.dumps(_measured(path) | {name: table}, indent=1) + "\n")
        print(f"{options.run}: {name}, {table['core_seconds']:.0f} s", flush=True)


def _measured(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def bits(row: Row) -> dict[str, Any]:
    """Bits per dimension of each test image, and of each level's share."""
    started = time.process_time()
    shares = bits_by_level(row.model, row.test, progress=PROGRESS)
    seconds = time.process_time() - started
    return {
        "images": len(row.test),
        "bits": shares.sum(0).tolist(),
        "levels": {
            str(r): own.tolist() for r, own in zip(row.model.resolutions, shares, strict=True)
        },
        "images_per_second": len(row.test) / seconds,
    }


def cost(row: Row) -> dict[str, Any]:
    """Parameters, operations, memory, evaluations, and images drawn a second."""
    few, described = row.test[:4], checkpoint.describe(row.run)
    generator = torch.Generator().manual_seed(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        parts = row.model.log_probs_by_level(few, generator=generator)
    started = time.process_time()
    row.model.sample(SAMPLED, generator=generator)
    sampling = time.process_time() - started
    return {
        "parameters": sum(own["parameters"] for own in described.values()),
        "flop": counter.get_total_flops() / len(few),
        "evaluations": sum(part.statistics.evaluations for part in parts.values()),
        "samples_per_second": SAMPLED / sampling,
        "levels": {
            str(r): _level_cost(row, r) | {"steps": own["step"]} for r, own in described.items()
        },
    }


def _level_cost(row: Row, resolution: int) -> dict[str, Any]:
    """Of a training step, not compiled: operations an image, and memory of the batch."""
    recipe = config.load(checkpoint.level_folder(row.run, resolution) / checkpoint.CONFIG)
    recipe = recipe.at_level(resolution)
    level = checkpoint.load_level(row.run, resolution).train().requires_grad_(True)
    objective, batch = Objective(level, recipe), recipe.train.batch

    def step(images: Tensor) -> None:
        loss, _ = objective(images, torch.Generator().manual_seed(0))
        loss.backward()
        level.zero_grad()

    images = row.test[:batch]
    with FlopCounterMode(display=False) as counter:
        step(images)
    return {
        "batch": batch,
        "step_flop": counter.get_total_flops() / batch,
        "peak_bytes": peak_bytes(lambda: step(images), level.device),
    }


def coded(row: Row) -> dict[str, Any]:
    """The first test images as a file, decoded again."""
    return _file(row.model, row.test[:CODED])


def _file(model: MultiResolutionFlow, images: Tensor) -> dict[str, Any]:
    started = time.process_time()
    result = codec.encode(model, images, verify=False, progress=PROGRESS)
    middle = time.process_time()
    back = codec.decompress(model, result.data, progress=PROGRESS)
    seconds = middle - started, time.process_time() - middle
    same = all(torch.equal(a, b) for a, b in zip(back, images, strict=True))
    return result.table() | {
        "same": same,
        "written_per_second": len(images) / seconds[0],
        "read_per_second": len(images) / seconds[1],
    }


def outliers(row: Row) -> dict[str, Any]:
    """Scores of images of other kinds against those of test images.

    Typical bits are the mean of the test images that are not scored.
    """
    levels, inside = row.coarsely(), row.test[:SCORED]
    shares = bits_by_level(levels, row.test[: 2 * SCORED], progress=PROGRESS)
    typical = float(shares.sum(0)[SCORED:].mean())
    own = _scores(levels, inside, shares[:, :SCORED], typical)
    fashion = mrcnf.data.load("fashion-mnist", "test", root=row.root, resolution=32).pixels
    others = {
        "CIFAR-100": mrcnf.data.load("cifar100", "test", root=row.root).pixels[:SCORED],
        "Fashion-MNIST": fashion[:SCORED].expand(-1, 3, -1, -1),
        "constant": ood.constant(SCORED, 3, 32),
        "noise": ood.noise(SCORED, 3, 32),
        **{f"patches of {side}": ood.shuffled(inside, side) for side in PATCHES},
    }
    found: dict[str, Any] = {"images": SCORED, "typical": typical, "kinds": {}}
    for kind, images in others.items():
        shares = bits_by_level(levels, images, seed=1, progress=PROGRESS)
        scores = _scores(levels, images, shares, typical)
        found["kinds"][kind] = {
            "bits": float(shares.sum(0).mean()),
            "auroc": {name: ood.auroc(scores[name], own[name]) for name in own},
            "interval": {name: ood.interval(scores[name], own[name]) for name in own},
        }
    return found


def _scores(
    levels: list[Level], images: Tensor, shares: Tensor, typical: float
) -> dict[str, np.ndarray]:
    bits = shares.sum(0).numpy()
    found = {
        "likelihood": -bits,
        "complexity": bits_of_files(images, ood.best_codec()).numpy() - bits,
        "typicality": -np.abs(bits - typical),
    }
    by_level = {f"level-{own.resolution}": -shares[i].numpy() for i, own in enumerate(levels)}
    return found if len(levels) == 1 else found | by_level


def attacked(row: Row) -> dict[str, Any]:
    """Bits of attacked images beside theirs before, and with random signs; and their files."""
    levels, images = row.coarsely(), row.test[:ATTACKED]
    found: dict[str, Any] = {"images": ATTACKED, "steps": GRADIENTS, "epsilons": {}}
    found["natural"] = bits_by_level(levels, images).tolist()
    exactly: MultiResolutionFlow = mrcnf.load(row.run)  # the bound, too, in all steps
    for epsilon in EPSILONS:
        changed = attack(
            levels, images, epsilon=epsilon, steps=GRADIENTS, progress=PROGRESS
        ).pixels
        signs = random_signs(images, epsilon)
        found["epsilons"][str(epsilon)] = {
            "attacked": bits_by_level(levels, changed).tolist(),
            "random": bits_by_level(levels, signs).tolist(),
            "file": _file(exactly, changed[:CODED]),
        }
    return found


def controls(row: Row) -> dict[str, Any]:
    """The attack with more and more steps, beside another row's; as `mrcnf attack` has it."""
    levels, (images, budgets) = row.coarsely(), CONTROLS[row.solved]
    found = robustness(
        levels, row.test[:images], (CONTROLS_EPSILON,), steps=budgets[-1], budgets=budgets,
        transfer=None if row.transfer is None else _coarsely(mrcnf.load(row.transfer)),
        progress=PROGRESS,
    )  # fmt: skip
    other = None if row.transfer is None else row.transfer.name
    return {"transfer": other, **found.to_dict()["rows"][0]}


PARTS: dict[str, Part] = {
    "bits": bits, "cost": cost, "codec": coded, "ood": outliers, "attack": attacked,
    "controls": controls,
}  # fmt: skip
ALWAYS = [name for name in PARTS if name != "controls"]

if __name__ == "__main__":
    main()
