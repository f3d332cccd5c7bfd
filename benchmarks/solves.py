"""Evaluation and sampling at stated accuracy against the published solves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.steps import Row, _nfe, compiles
from benchmarks.timing import Work, alternate, compare, peak_bytes
from benchmarks.workload import Workload
from mrcnf.flows.solve import Solver, Statistics
from mrcnf.flows.trace import Trace
from mrcnf.image.bits import bits_per_dim
from mrcnf.measure import reference
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow

TIGHT = Solver("dopri5", 0, rtol=1e-7, atol=1e-7)
ALLOWED = 1e-3
"""Bits per dimension by which any image may differ from the tight solve, level by level."""
GRIDS = (("midpoint", (1, 2, 3, 4, 6, 8, 12)), ("rk4", (1, 2, 3, 4, 6, 8)), ("bosh3", (2, 3, 4, 6)))
PUBLISHED = "bosh3 1e-5, first step 1/6, reverse-mode trace, one Gaussian probe"


def candidates(value_only: bool) -> list[Solver]:
    """Fixed-step solvers from cheap to dear; a tangent costs as much as a value."""

    def cost(solver: Solver) -> float:
        passes = _nfe(solver) * (1 if value_only else 2)
        if solver.method == "midpoint" and not value_only:
            passes -= solver.steps  # its first stages need no trace
        return passes

    found = [
        Solver(method, steps, spacing)
        for method, counts in GRIDS
        for steps in counts
        for spacing in (1.0, 1.5)
        if steps > 1 or spacing == 1.0
    ]
    return sorted(found, key=cost)


def double(model: MultiResolutionFlow) -> MultiResolutionFlow:
    return copy.deepcopy(model).double()


def _bits(level: Level, x: Tensor, solver: Solver) -> tuple[Tensor, Statistics]:
    generator = torch.Generator(x.device).manual_seed(2)
    result = level.log_prob(x, solver=solver, trace=Trace(), generator=generator)
    return bits_per_dim(result.log_prob, result.dims), result.statistics


@torch.no_grad()
def evaluate_rows(work: Workload, repeats: int, quick: bool) -> list[Row]:
    """Density of a batch, all levels, each with the cheapest solver that is right to 1e-3."""
    x, _ = work.take(work.batch)
    exact = double(work.model)
    chosen: dict[int, Solver] = {}
    truths = {}
    for level in work.model:
        truths[level.resolution], _ = _bits(exact.level(level.resolution), x.double(), TIGHT)
        for solver in candidates(value_only=False):
            if _worst(_bits(level, x, solver)[0], truths[level.resolution]) <= ALLOWED:
                break
        chosen[level.resolution] = solver

    def ours(half: bool = False, model: MultiResolutionFlow = work.model) -> dict[int, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            return {a.resolution: _bits(a, x, chosen[a.resolution])[0] for a in model}

    def theirs() -> dict[int, int]:
        generator = torch.Generator(x.device).manual_seed(2)
        return {
            a.resolution: reference.log_prob(a, x, generator=generator).statistics.evaluations
            for a in work.model
        }

    answers: dict[str, Callable[[], dict[int, Tensor]]] = {
        "float32": ours,
        "bfloat16": partial(ours, True),
    }
    if compiles(work.device, quick):
        fast = copy.deepcopy(work.model)
        for level in fast:
            level.compile()
        answers["float32, compiled"] = partial(ours, model=fast)
    works: dict[str, Work] = {"reference": theirs, **answers}
    seconds = alternate(works, work.device, repeats)
    rows: list[Row] = []
    for name, answer in answers.items():
        errors = {r: _worst(found, truths[r]) for r, found in answer().items()}
        within = max(errors.values()) <= ALLOWED
        rows.append(
            {
                "work": "evaluate",
                "name": f"all levels, {name}" + ("" if within else " (beyond 1e-3: no result)"),
                **compare(seconds["reference"], seconds[name]),
                "peak_bytes": peak_bytes(works[name], work.device),
                "reference_peak_bytes": peak_bytes(theirs, work.device),
                "images": len(x),
                "nfe": {r: 2 * _nfe(solver) for r, solver in chosen.items()},
                "reference_nfe": theirs(),
                "settings": {r: str(solver) for r, solver in chosen.items()},
                "reference_settings": PUBLISHED,
                "largest_bpd_difference": errors,
                "tight": f"float64, {TIGHT}",
            }
        )
    return rows


def _worst(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max())


@torch.no_grad()
def sample_rows(work: Workload, repeats: int) -> list[Row]:
    """Sampling with the cheapest solvers whose end points are no worse than the published ones."""
    generator = torch.Generator().manual_seed(3)
    latents = {
        level.resolution: torch.randn(
            work.batch, *level.latent_shape(*work.x.shape[2:]), generator=generator
        ).to(work.device)
        for level in work.model
    }
    exact = _grow(double(work.model), {r: z.double() for r, z in latents.items()}, TIGHT)
    solvers = candidates(value_only=True)
    errors = {s: _grey(_grow(work.model, latents, s), exact) for s in solvers}
    rows: list[Row] = []
    for tolerance in (1e-5, 1e-3):
        published = Solver("bosh3", 0, rtol=tolerance, atol=tolerance, first_step=1 / 6)

        def theirs(density: bool = True, solver: Solver = published) -> tuple[Tensor, int]:
            return _grow_published(work.model, latents, solver, density)

        allowed = _grey(theirs()[0], exact)
        matching = [s for s in solvers if errors[s] <= allowed]
        same = matching[0] if matching else min(solvers, key=lambda s: errors[s])
        chosen = _relax(work.model, latents, same, solvers, exact, allowed)
        works: dict[str, Work] = {
            "reference": theirs,
            "value": partial(theirs, False),
            "ours": partial(_grow, work.model, latents, chosen),
        }
        seconds = alternate(works, work.device, repeats)
        row = compare(seconds["reference"], seconds["ours"])
        measured = row["seconds"]
        assert isinstance(measured, float)
        rows.append(
            {
                "work": "sample",
                "name": f"all levels, error of bosh3 {tolerance:g}",
                **row,
                "ratio_without_density": compare(seconds["value"], seconds["ours"])["ratio"],
                "peak_bytes": peak_bytes(works["ours"], work.device),
                "reference_peak_bytes": peak_bytes(theirs, work.device),
                "images": work.batch,
                "images_per_second": work.batch / measured,
                "nfe": {r: 2 * _nfe(solver) for r, solver in chosen.items()},
                "reference_nfe": theirs()[1],
                "settings": {r: str(solver) for r, solver in chosen.items()},
                "reference_settings": f"bosh3 {tolerance:g}, first step 1/6, density carried along",
                "error_grey_levels": _grey(_grow(work.model, latents, chosen), exact),
                "reference_error_grey_levels": allowed,
                "equal_error": bool(matching),
                "tight": f"float64, {TIGHT}",
            }
        )
    return rows


def _relax(
    model: MultiResolutionFlow,
    latents: Mapping[int, Tensor],
    same: Solver,
    solvers: list[Solver],
    exact: Tensor,
    allowed: float,
) -> dict[int, Solver]:
    """From one solver for all levels, cheaper ones level by level, finest first, where enough."""
    chosen = dict.fromkeys(latents, same)
    for resolution in sorted(latents, reverse=True):
        for solver in solvers[: solvers.index(same)]:
            trial = chosen | {resolution: solver}
            if _grey(_grow(model, latents, trial), exact) <= allowed:
                chosen = trial
                break
    return chosen


def _grow(
    model: MultiResolutionFlow,
    latents: Mapping[int, Tensor],
    solver: Solver | Mapping[int, Solver],
) -> Tensor:
    x: Tensor | None = None
    for level in model:
        own = solver[level.resolution] if isinstance(solver, Mapping) else solver
        x = level.generate(latents[level.resolution], x, own)
    assert x is not None
    return x


def _grow_published(
    model: MultiResolutionFlow, latents: Mapping[int, Tensor], solver: Solver, density: bool
) -> tuple[Tensor, int]:
    x, total = None, Statistics()
    for level in model:
        x, cost = reference.sample(
            level, latents[level.resolution], x, solver=solver, density=density
        )
        total = total + cost
    assert x is not None
    return x, total.evaluations


def _grey(found: Tensor, truth: Tensor) -> float:
    """Root mean square difference in grey levels."""
    return float(256 * (found.double() - truth).square().mean().sqrt())
