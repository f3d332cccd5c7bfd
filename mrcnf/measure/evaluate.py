"""Bits per dimension with their error, and the proof that the digits hold."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mrcnf import runtime, seeds
from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.image.bits import bits_per_dim
from mrcnf.image.noise import check_images, dequantise
from mrcnf.measure import correction
from mrcnf.model.level import Level, likelihoods
from mrcnf.runs.config import changed


@dataclass
class LevelReport:
    """One level's part of the bits."""

    resolution: int
    bpd: float
    """Its share of the total, in bits per dimension of the finest image; shares add up."""
    bpd_stderr: float
    nfe: float
    """Evaluations of the velocity per solve, mean over batches; a flow that is not solved is
    evaluated once."""
    rejected: float
    """Rejected steps per solve, mean over batches."""
    solver: str


ALIKE = "crops of few photographs"
"""What errors are over that are too small, as crops of one photograph are alike."""


@dataclass
class Evaluation:
    """What the model is worth on some images."""

    data: str
    images: int
    bpd: float
    """Mean over images of the bound's bits per dimension, of the levels below together."""
    bpd_stderr: float
    """Standard error of the mean, over what `error_over` says."""
    error_over: str
    """images; or, where the data know their sources, photographs if there are at least 8, else
    `ALIKE`."""
    levels: list[LevelReport]
    draws: int
    trace: str
    solver: str
    seconds: float
    corrected: dict[str, Any] | None = None
    """What few steps were off by, added to all of the above: its mean and standard error, and the
    number of images that it is of."""
    convergence: list[dict[str, Any]] = field(default_factory=list)
    """The same noise and probes on a subset, solved more and more finely."""
    bits: Tensor = field(default_factory=lambda: torch.empty(0, 0), repr=False, compare=False)
    """Each level's share of the bits per dimension of each image, (levels, images), the same
    correction in all; not in the JSON."""

    def to_json(self) -> str:
        table = asdict(self)
        del table["bits"]
        return json.dumps(table, indent=2)

    @property
    def noise_draws(self) -> str:
        """How many, in words."""
        return "1 noise draw" if self.draws == 1 else f"{self.draws} noise draws"

    def __str__(self) -> str:
        total = f"{self.bpd:.4f} ± {self.bpd_stderr:.4f} bits/dim"
        over = "" if self.error_over == "images" else f" (error over {self.error_over})"
        rows = [f"{total} on {self.images} images of {self.data}{over}"]
        for level in self.levels:
            rows.append(
                f"  level {level.resolution:4d}: {level.bpd:.4f} ± {level.bpd_stderr:.4f}"
                f"   NFE {level.nfe:.0f}   {level.solver}"
            )
        rows.append(f"  {self.noise_draws}, trace {self.trace}, {self.seconds:.1f} s")
        if self.corrected:
            rows.append(
                "  of which {bpd:+.5f} ± {bpd_stderr:.5f} corrects the steps of the solver, found "
                "on {images} images".format(**self.corrected)
            )
        for row in self.convergence:
            rows.append(
                f"  {row['solver']:<40} {row['bpd']:.5f}  {row['difference']:+.5f}"
                f" ± {row['difference_stderr']:.5f}"
            )
        return "\n".join(rows)


def evaluate(
    levels: Iterable[Level],
    images: Images | Tensor,
    *,
    limit: int = 0,
    batch: int = 100,
    draws: int = 1,
    seed: int = 0,
    compile: bool = False,
    tolerance: float = 0.0,
    progress: bool = False,
) -> Evaluation:
    """Bits per dimension of the images, by level and in total, with standard errors.

    Solver and trace are each level's own (`level.solver`, `level.trace`; set them to change).

    Args:
        levels: a model, or some of its levels; the total is theirs.
        images: with the name that the result mentions; or uint8 (N, C, H, W).
        limit: evaluate the first so many; 0 evaluates all.
        batch: images solved together.
        draws: dequantisation draws per image, averaged.
        seed: of noise and probes; batch b and draw d have a seed of their own, so numbers
            compare between solvers.
        compile: compile the levels' networks first, which takes a minute; they stay so.
        tolerance: above 0, solve in fewer steps and add what they are off by, as some images show
            (`correction`), with a standard error of about so many bits per dimension.
        progress: show a bar on stderr.

    Raises:
        UserError: fewer than 2 images, or not such as the model is of; no compiler; a tolerance
            for levels without a number of steps.
    """
    levels = list(levels)
    if min(batch, draws) < 1 or limit < 0:
        raise UserError(
            f"batch {batch} and draws {draws} must be at least 1, and limit {limit} at least 0"
        )
    if isinstance(images, Tensor):
        images = Images(images, "a tensor", "")
    images = images.first(limit or None)
    check_images(images.pixels, levels[0].model.channels)
    if len(images) < 2:
        raise UserError(
            f"{images.name} has {len(images)} images to evaluate; at least 2 are needed"
        )
    started = time.perf_counter()
    if compile:
        for level in levels:
            runtime.require_compiler(level.device, "evaluate.compile")
            level.compile()
    found = None
    if tolerance:
        found = correction.plan(
            levels, images.pixels,
            lambda pixels, solvers: _bits(
                levels, pixels, batch, 1, seed, solvers, progress, "few or many steps"
            )[0],
            tolerance,
        )  # fmt: skip
    few = {} if found is None else found.few
    bits, costs = _bits(levels, images.pixels, batch, draws, seed, few, progress=progress)
    if found is not None:
        bits += found.differences.mean(1, keepdim=True)

    def off(found: correction.Plan, which: slice) -> tuple[float, float]:
        groups = None if images.groups is None else images.groups[found.chosen]
        return mean_and_error(found.differences[which].sum(0), groups)

    def mean(which: slice) -> tuple[float, float]:
        value, error = mean_and_error(bits[which].sum(0), images.groups)
        return value, error if found is None else math.hypot(error, off(found, which)[1])

    reports = []
    for i, level in enumerate(levels):
        share, (evaluations, rejected) = mean(slice(i, i + 1)), costs[i]
        fewer = f", from {few[level.resolution].steps}" if level.resolution in few else ""
        reports.append(
            LevelReport(level.resolution, *share, evaluations, rejected, _solver(level) + fewer)
        )
    bpd, error = mean(slice(None))
    corrected = None
    if found is not None:
        shift, own = off(found, slice(None))
        corrected = {"bpd": shift, "bpd_stderr": own, "images": len(found.chosen)}
    return Evaluation(
        data=f"{images.name} {images.split}".strip(),
        images=len(images),
        bpd=bpd,
        bpd_stderr=error,
        error_over=_error_over(images.groups),
        levels=reports,
        draws=draws,
        trace=_common(
            str(level.trace) if level.flow.solved else "exact" for level in levels
        ),
        solver=_common(report.solver for report in reports),
        seconds=time.perf_counter() - started,
        corrected=corrected,
        bits=bits,
    )


def set_solvers(levels: Iterable[Level], changes: dict[str, Any]) -> None:
    """Change entries of every level's own solver and trace, from a table of settings.

    Raises:
        UserError: the table changes what a trained model cannot have changed.
    """
    fixed = set(changes) - {"data", "evaluate", "solver", "trace"}
    if fixed:
        raise UserError(
            f"{sorted(fixed)[0]} cannot be changed in a trained model; evaluation takes settings "
            "of data, evaluate, solver and trace"
        )
    for level in levels:
        level.solver = changed(level.solver, changes.get("solver", {}), "solver")
        level.trace = changed(level.trace, changes.get("trace", {}), "trace")


def convergence(
    levels: Iterable[Level],
    images: Images,
    *,
    limit: int = 100,
    batch: int = 100,
    seed: int = 0,
    refinements: int = 2,
) -> list[dict[str, Any]]:
    """Solve a subset again with twice the steps (a tenth of the tolerances), repeatedly.

    Noise and probes are the same throughout, so the differences are the solver's alone; their
    standard errors are over images. Rows: solver, bpd, difference from the row before.

    Raises:
        UserError: as `check_solved`.
    """
    levels = list(levels)
    check_solved(levels)
    rows: list[dict[str, Any]] = []
    before: Tensor | None = None
    solvers: dict[int, Solver] = {level.resolution: level.solver for level in levels}
    for _ in range(refinements + 1):
        bits, costs = _bits(levels, images.pixels[:limit], batch, 1, seed, solvers)
        total = bits.sum(0)
        difference = torch.zeros_like(total) if before is None else total - before
        mean, error = mean_and_error(difference, None)
        rows.append(
            {
                "solver": _common(
                    str(solvers[level.resolution]) for level in levels if level.flow.solved
                ),
                "bpd": float(total.mean()),
                "difference": mean,
                "difference_stderr": error,
                "levels": bits.mean(1).tolist(),
                "nfe": [evaluations for evaluations, _ in costs],
                "images": len(total),
            }
        )
        before = total
        solvers = {resolution: solver.finer() for resolution, solver in solvers.items()}
    return rows


def check_solved(levels: Iterable[Level]) -> None:
    """A UserError unless some level has a solver, for `convergence` to make finer."""
    if not any(level.flow.solved for level in levels):
        raise UserError(
            "--convergence: no level of this run has a solver, their bits are exact; leave it out"
        )


def mean_and_error(values: Tensor, groups: Tensor | None) -> tuple[float, float]:
    """Mean and standard error of (N,) values; by groups where images share a source.

    With groups the error is that of a ratio of group sums (the linearised bootstrap over
    photographs), because crops of one photograph are correlated. It needs at least 8 groups
    to mean anything; with fewer, images count as independent.
    """
    values = values.double()
    mean = values.mean()
    if not _grouped(groups):
        return float(mean), float(values.std() / math.sqrt(len(values)))
    assert groups is not None
    _, index = groups.unique(return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, index, values - mean)
    g = len(sums)
    return float(mean), float((sums.square().sum() * g / (g - 1)).sqrt() / len(values))


@torch.no_grad()
def _bits(
    levels: Iterable[Level],
    images: Tensor,
    batch: int,
    draws: int,
    seed: int,
    solver: Mapping[int, Solver] | None = None,
    progress: bool = False,
    label: str = "evaluate",
) -> tuple[Tensor, list[tuple[float, float]]]:
    """Bits per dimension of the images, by level and image, and mean NFE and rejections by level.

    Under torchrun each process takes every K-th batch; all of them get the whole result.
    """
    levels = list(levels)
    rank, world = runtime.rank_and_world()
    model, device = levels[0].model, levels[0].device
    batches = images.split(batch)
    bits = torch.zeros(len(levels), len(images), dtype=torch.float64)
    costs = torch.zeros(len(levels), 2, dtype=torch.float64)
    quiet = not progress or rank > 0
    bar = tqdm(total=len(images) * draws, desc=label, unit="image", disable=quiet)
    for b, chunk in enumerate(batches):
        if b % world != rank:
            continue
        first = b * batch
        for draw in range(draws):
            generator = seeds.generator(seeds.of_batch(seed, b, draw), device)
            x, log_q = dequantise(
                chunk.to(device), nbits=model.nbits, kind=model.pixel_noise, generator=generator
            )
            parts = likelihoods(levels, x, log_q, generator=generator, solver=solver)
            for i, part in enumerate(parts.values()):
                share = bits_per_dim(part.log_prob.double().cpu(), x[0].numel())
                bits[i, first : first + len(chunk)] += share / draws
                cost = part.statistics
                costs[i] += torch.tensor([cost.evaluations, cost.rejected], dtype=torch.float64)
            bar.update(len(chunk) * world)
    bar.close()
    if world > 1:
        bits, costs = (runtime.sum_over_processes(tensor, device) for tensor in (bits, costs))
    mean_costs = (costs / (len(batches) * draws)).tolist()
    return bits, [(nfe, rejected) for nfe, rejected in mean_costs]


def bits_by_level(
    levels: Iterable[Level],
    images: Tensor,
    *,
    batch: int = 100,
    draws: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Each level's share of the bits per finest dimension of each image, (levels, N).

    Images in the same places have the same noise and probes, so differences between two calls
    are those of the images. The rest is as in `evaluate`.
    """
    levels = list(levels)
    check_images(images, levels[0].model.channels)
    return _bits(levels, images, batch, draws, seed, progress=progress)[0]


def level_bits(level: Level, images: Tensor, *, batch: int = 100, seed: int = 0) -> Tensor:
    """One level's share of the bits per finest dimension, (N,), without the other levels."""
    return _bits([level], images, batch, 1, seed)[0][0]


def _solver(level: Level) -> str:
    return str(level.solver) if level.flow.solved else "no solver: one pass"


def _error_over(groups: Tensor | None) -> str:
    if _grouped(groups):
        return "photographs"
    alike = groups is not None and len(groups.unique()) < len(groups)
    return ALIKE if alike else "images"


def _grouped(groups: Tensor | None) -> bool:
    return groups is not None and len(groups.unique()) >= 8


def _common(texts: Any) -> str:
    return " | ".join(dict.fromkeys(texts))
