"""How cost and memory grow with the resolution of a level and with the number of steps."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.steps import (
    MAIN,
    PUBLISHED,
    Row,
    _nfe,
    evaluations,
    likelihood_step,
    published_step,
)
from benchmarks.timing import Work, alternate, compare, peak_bytes
from benchmarks.workload import one_block, single_level
from mrcnf.flows.solve import Solver
from mrcnf.model.level import Level
from mrcnf.training import objectives


def scale_rows(device: str, repeats: int, quick: bool) -> list[Row]:
    rows: list[Row] = []
    before: dict[str, float] = {}
    for resolution in (16, 32) if quick else (16, 32, 64, 128):
        level, x, log_q = single_level(resolution, device, 2)
        single = one_block(level)

        def match(single: Level = single, x: torch.Tensor = x) -> None:
            single.zero_grad()
            generator = torch.Generator(x.device).manual_seed(1)
            objectives.flow_matching(single, x, generator=generator)[0].backward()

        works: dict[str, Work] = {
            "reference": partial(published_step, level, x, log_q),
            "ml_step": partial(likelihood_step, level, x, log_q, MAIN),
            "fm_step": match,
        }
        seconds = alternate(works, x.device, repeats)
        nfe = evaluations(level, x, log_q)
        for name in ("ml_step", "fm_step"):
            row = compare(seconds["reference"], seconds[name])
            each = min(seconds[name]) / len(x)
            rows.append(
                {
                    "work": "scale",
                    "name": f"{name}, level {resolution}",
                    **row,
                    "peak_bytes": peak_bytes(works[name], x.device),
                    "reference_peak_bytes": peak_bytes(works["reference"], x.device),
                    "images": len(x),
                    "nfe": 1 if name == "fm_step" else 2 * _nfe(MAIN),
                    "reference_nfe": nfe,
                    "settings": str(MAIN) if name == "ml_step" else "flow matching, one block",
                    "reference_settings": PUBLISHED + ", two blocks",
                    "kind": name,
                    "resolution": resolution,
                    "seconds_per_image": each,
                    "growth": each / before[name] if name in before else None,
                }
            )
            before[name] = each
    return rows + memory_rows(device, quick)


def memory_rows(device: str, quick: bool) -> list[Row]:
    """Peak memory of one likelihood step of level 32 against its number of steps."""
    level, x, log_q = single_level(32, device, 2)
    solvers = [
        Solver("bosh3", steps, 1.0, gradient=how)
        for how in ("direct", "checkpoint")
        for steps in ((2, 4) if quick else (2, 4, 8, 16))
    ]
    solvers.append(Solver("bosh3", 0, rtol=1e-3, atol=1e-3, first_step=1 / 6, gradient="adjoint"))
    works: dict[str, Work] = {"reference": lambda: published_step(level, x, log_q)}
    works |= {f"{s.gradient}, {s}": partial(likelihood_step, level, x, log_q, s) for s in solvers}
    seconds = alternate(works, x.device, 1)
    peak = peak_bytes(works["reference"], x.device)
    return [
        {
            "work": "scale",
            "name": f"memory, level 32: {name}",
            **compare(seconds["reference"], seconds[name]),
            "peak_bytes": peak_bytes(works[name], x.device),
            "reference_peak_bytes": peak,
            "images": len(x),
            "nfe": 2 * _nfe(solver) if solver.steps else None,
            "settings": name,
            "reference_settings": PUBLISHED,
            "kind": "memory",
            "gradient_method": solver.gradient,
            "steps": solver.steps,
        }
        for name, solver in zip(list(works)[1:], solvers, strict=True)
    ]


def plot(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Seconds and memory per image against resolution, and memory against steps."""
    from matplotlib.figure import Figure

    found = [row for row in rows if row["work"] == "scale"]
    figure = Figure((11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for kind, label in (("ml_step", "maximum likelihood"), ("fm_step", "flow matching")):
        own = [row for row in found if row["kind"] == kind]
        sides = [row["resolution"] for row in own]
        left.loglog(sides, [row["seconds_per_image"] for row in own], "o-", label=label)
        each = [row["peak_bytes"] / row["images"] / 2**20 for row in own]
        middle.loglog(sides, each, "o-", label=label)
    own = [row for row in found if row["kind"] == "ml_step"]
    sides = [row["resolution"] for row in own]
    left.loglog(
        sides, [row["reference_seconds"] / row["images"] for row in own], "x--", label="published"
    )
    theirs = [row["reference_peak_bytes"] / row["images"] / 2**20 for row in own]
    middle.loglog(sides, theirs, "x--", label="published")
    for how in ("direct", "checkpoint"):
        own = [row for row in found if row.get("gradient_method") == how]
        mib = [row["peak_bytes"] / row["images"] / 2**20 for row in own]
        right.plot([row["steps"] for row in own], mib, "o-", label=how)
    for row in found:
        if row.get("gradient_method") == "adjoint":
            mib_adjoint = row["peak_bytes"] / row["images"] / 2**20
            right.axhline(mib_adjoint, ls="--", c="gray", label="adjoint, adaptive")
    for axis in (left, middle):
        axis.set_xlabel("resolution of the level (pixels)")
        axis.set_xticks(sides, [str(side) for side in sides])
        axis.minorticks_off()
    left.set_ylabel("seconds per image and step")
    middle.set_ylabel("peak memory per image (MiB)")
    right.set_ylabel("peak memory per image (MiB)")
    right.set_xlabel("solver steps (bosh3), level 32")
    for axis in (left, middle, right):
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
