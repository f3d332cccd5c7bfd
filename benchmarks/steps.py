"""Training steps: maximum likelihood and flow matching against the published step."""

from __future__ import annotations

import copy
import shutil
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.timing import Work, alternate, compare, peak_bytes
from benchmarks.workload import Workload, one_block
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.measure import reference
from mrcnf.model.level import Level
from mrcnf.training import objectives

Row = dict[str, object]
FORWARD = "forward-mode trace, one Rademacher probe, differentiated through"
PUBLISHED = "reverse-mode trace, one Gaussian probe, bosh3 1e-3, first step 1/6, continuous adjoint"
TIGHT = Solver("rk4", 12, 1.0)
MAIN = Solver("rk4", 2, 1.0)
# From cheap to dear in passes through the network, a value and its tangent counting two.
CANDIDATES = (
    Solver("midpoint", 2, 1.0),
    Solver("rk4", 1, 1.0),
    Solver("midpoint", 3, 1.0),
    Solver("bosh3", 2, 1.0),
    Solver("midpoint", 4, 1.0),
    Solver("rk4", 2, 1.0),
    Solver("bosh3", 3, 1.0),
    Solver("bosh3", 4, 1.0),
    Solver("rk4", 4, 1.0),
)
TOLERANCE = 0.01
"""Relative difference of gradients that is taken for agreement, unless the published step's own
is larger; one probe's noise in the same gradient is from 0.1 to 0.6."""


def likelihood_step(level: Level, x: Tensor, log_q: Tensor, solver: Solver) -> None:
    level.zero_grad()
    generator = torch.Generator(x.device).manual_seed(1)
    loss, _ = objectives.likelihood(
        level, x, log_q, solver=solver, trace=Trace(), generator=generator
    )
    loss.backward()


def match_step(level: Level, x: Tensor, half: bool = False) -> None:
    level.zero_grad()
    generator = torch.Generator(x.device).manual_seed(1)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        loss, _ = objectives.flow_matching(level, x, generator=generator)
    loss.backward()


def published_step(
    level: Level, x: Tensor, log_q: Tensor, solver: Solver = reference.TRAINING
) -> None:
    level.zero_grad()
    generator = torch.Generator(x.device).manual_seed(1)
    loss, _ = reference.training_step(level, x, log_q, solver=solver, generator=generator)
    loss.backward()


def _published_steps(levels: list[Level], x: Tensor, log_q: Tensor) -> None:
    for level in levels:
        published_step(level, x, log_q)


def gradient(level: Level, step: Work) -> Tensor:
    step()
    found = [p.grad.flatten().double() for p in level.parameters() if p.grad is not None]
    return torch.cat(found)


def agreement(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative difference and cosine."""
    difference = float((found - truth).norm() / truth.norm())
    return difference, float(torch.cosine_similarity(found, truth, dim=0))


def evaluations(level: Level, x: Tensor, log_q: Tensor) -> int:
    """Evaluations of one published training step over all blocks, forward and backward."""
    count = 0
    field = reference.ConcatenatedField.run

    def counted(*args: object) -> object:
        nonlocal count
        count += 1
        return field(*args)  # type: ignore[arg-type]

    reference.ConcatenatedField.run = counted  # type: ignore[assignment,method-assign]
    try:
        published_step(level, x, log_q)
    finally:
        reference.ConcatenatedField.run = field  # type: ignore[method-assign]
    return count


def ml_rows(work: Workload, repeats: int, quick: bool) -> list[Row]:
    """The step of all levels; again with steps chosen by level; switches at the finest level."""
    x, log_q = work.take(work.batch)
    levels = list(work.model)
    chosen, errors = _choose(levels, x, log_q)
    settings = {"same": dict.fromkeys(chosen, MAIN), "by level": chosen}

    def ours(solvers: Mapping[int, Solver]) -> None:
        for level in levels:
            likelihood_step(level, x, log_q, solvers[level.resolution])

    works: dict[str, Work] = {
        "reference": partial(_published_steps, levels, x, log_q),
        **{name: partial(ours, solvers) for name, solvers in settings.items()},
    }
    bare = {}
    for name, solvers in settings.items():
        parts: list[tuple[Level, Work]] = [
            (a, partial(likelihood_step, a, x, log_q, solvers[a.resolution])) for a in levels
        ]
        bare[name] = machine.share_of(parts, 2 * len(x))
    convolutions = {f"bare, {name}": run for name, (run, _) in bare.items()}
    seconds = alternate(works | convolutions, work.device, repeats)
    peaks = {name: peak_bytes(run, work.device) for name, run in works.items()}
    nfe = {level.resolution: evaluations(level, x, log_q) for level in levels}
    rows: list[Row] = []
    for name, solvers in settings.items():
        row = compare(seconds["reference"], seconds[name])
        rows.append(
            {
                "work": "ml_step",
                "name": f"all levels, {'one solver' if name == 'same' else 'solver by level'}",
                **row,
                "peak_bytes": peaks[name],
                "reference_peak_bytes": peaks["reference"],
                "images": len(x),
                "nfe": {r: 2 * _nfe(solver) for r, solver in solvers.items()},
                "reference_nfe": nfe,
                "settings": {r: f"{solver}; {FORWARD}" for r, solver in solvers.items()},
                "reference_settings": PUBLISHED,
                "gradient": {r: errors[r][str(solver)] for r, solver in solvers.items()},
                "reference_gradient": {r: errors[r]["reference"] for r in solvers},
                "share_of_convolutions": _share(
                    seconds[f"bare, {name}"], bare[name][1], seconds[name]
                ),
            }
        )
    return rows + _switches(work, repeats, quick)


def _choose(
    levels: list[Level], x: Tensor, log_q: Tensor
) -> tuple[dict[int, Solver], dict[int, dict[str, tuple[float, float]]]]:
    """For each level the cheapest candidate whose gradient agrees, and all (difference, cosine)."""
    chosen, errors = {}, {}
    tight = Solver("dopri5", 0, rtol=1e-5, atol=1e-5)
    for level in levels:
        ours, published = (partial(f, level, x, log_q) for f in (likelihood_step, published_step))
        truth = gradient(level, partial(ours, TIGHT))
        theirs = agreement(gradient(level, published), gradient(level, partial(published, tight)))
        found = {"reference": theirs}
        for solver in CANDIDATES:
            found[str(solver)] = agreement(gradient(level, partial(ours, solver)), truth)
            if found[str(solver)][0] <= max(TOLERANCE, theirs[0]):
                chosen[level.resolution] = solver
                break
        else:
            chosen[level.resolution] = CANDIDATES[-1]
        if str(MAIN) not in found:
            found[str(MAIN)] = agreement(gradient(level, partial(ours, MAIN)), truth)
        errors[level.resolution] = found
    return chosen, errors


def _share(bare: list[float], factor: float, step: list[float]) -> float:
    """Of the time that bare convolutions would take in the time that a step took."""
    return factor * statistics.median(a / b for a, b in zip(bare, step, strict=True))


def _nfe(solver: Solver) -> int:
    stages = {"euler": 1, "midpoint": 2, "heun": 2, "bosh3": 3, "rk4": 4}
    return stages[solver.method] * solver.steps


def _switches(work: Workload, repeats: int, quick: bool) -> list[Row]:
    """Each switch by itself, at the finest level, with the same solver."""
    x, log_q = work.take(work.batch)
    level = list(work.model)[-1]
    truth = gradient(level, lambda: likelihood_step(level, x, log_q, TIGHT))
    works: dict[str, Work] = {
        "reference": lambda: published_step(level, x, log_q),
        "plain": lambda: likelihood_step(level, x, log_q, MAIN),
    }
    models: dict[str, Level] = {"plain": level}
    skipped: dict[str, str] = {}

    def half() -> None:
        with torch.autocast(work.device.type, torch.bfloat16):
            likelihood_step(level, x, log_q, MAIN)

    works["bfloat16"], models["bfloat16"] = half, level
    if compiles(work.device, quick):
        _try("compile", _compiled, level, x, log_q, works, models, skipped)
    else:
        skipped["compile"] = "no C++ compiler, or --quick"
    if work.device.type == "cuda":
        fast = "compile, bfloat16, CUDA graph"
        _try("CUDA graph", _captured, level, x, log_q, works, models, skipped)
        _try(fast, _captured_fast, level, x, log_q, works, models, skipped)
    seconds = alternate(works, work.device, repeats)
    rows: list[Row] = []
    for name in models:
        found = gradient(models[name], works[name])
        rows.append(
            {
                "work": "ml_step",
                "name": f"level {level.resolution}: {name}",
                **compare(seconds["reference"], seconds[name]),
                "peak_bytes": peak_bytes(works[name], work.device),
                "images": len(x),
                "nfe": 2 * _nfe(MAIN),
                "settings": f"{MAIN}; {FORWARD}",
                "reference_settings": PUBLISHED,
                "gradient": agreement(found, truth),
            }
        )
    if skipped:
        rows[0]["skipped"] = skipped
    return rows


def compiles(device: torch.device, quick: bool) -> bool:
    """Whether rows of torch.compile are measured: it takes minutes, and on a CPU a compiler."""
    return not quick and (device.type != "cpu" or bool(shutil.which("g++") or shutil.which("c++")))


Maker = Callable[[Level, Tensor, Tensor], tuple[Level, Work]]


def _try(
    name: str,
    make: Maker,
    level: Level,
    x: Tensor,
    log_q: Tensor,
    works: dict[str, Work],
    models: dict[str, Level],
    skipped: dict[str, str],
) -> None:
    """A switch that a machine may not have must not end the run: its reason is kept."""
    try:
        model, run = make(level, x, log_q)
        run()
    except Exception as error:
        skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return
    works[name], models[name] = run, model


def _compiled(
    level: Level, x: Tensor, log_q: Tensor, backend: str = "inductor"
) -> tuple[Level, Work]:
    fast = copy.deepcopy(level)
    # Whole or not at all: a silent return to eager would be measured as a gain of nothing.
    fast.compile(fullgraph=True, backend=backend)
    return fast, lambda: likelihood_step(fast, x, log_q, MAIN)


def _captured(
    level: Level, x: Tensor, log_q: Tensor, half: bool = False, compiled: bool = False
) -> tuple[Level, Work]:
    """The whole step, backward pass included, as one CUDA graph over fixed buffers.

    Probes come from the default generator, which a graph advances by itself.
    """
    fast = _compiled(level, x, log_q)[0] if compiled else copy.deepcopy(level)

    def step() -> None:
        # Without the cache: weights cast inside a graph must be cast again in each replay.
        context = torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
        with context if half else nullcontext():
            loss, _ = objectives.likelihood(fast, x, log_q, solver=MAIN, trace=Trace())
        loss.backward()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            fast.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(aside)
    fast.zero_grad(set_to_none=True)  # so the capture makes the gradients, and replays rewrite them
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return fast, graph.replay


def _captured_fast(level: Level, x: Tensor, log_q: Tensor) -> tuple[Level, Work]:
    return _captured(level, x, log_q, half=True, compiled=True)


def fm_rows(work: Workload, repeats: int) -> list[Row]:
    """Flow matching of each level's first block against the published step of that block."""
    x, log_q = work.take(work.batch)
    levels = [one_block(level) for level in work.model]

    def match(half: bool = False) -> None:
        for level in levels:
            match_step(level, x, half)

    works: dict[str, Work] = {
        "reference": partial(_published_steps, levels, x, log_q),
        "float32": match,
        "bfloat16": lambda: match(True),
    }
    bare, factor = machine.share_of([(a, partial(match_step, a, x)) for a in levels], len(x))
    seconds = alternate(works | {"bare": bare}, work.device, repeats)
    rows: list[Row] = []
    for name in ("float32", "bfloat16"):
        row: Row = {
            "work": "fm_step",
            "name": f"all levels, one block, {name}",
            **compare(seconds["reference"], seconds[name]),
            "peak_bytes": peak_bytes(works[name], work.device),
            "reference_peak_bytes": peak_bytes(works["reference"], work.device),
            "images": len(x),
            "nfe": 1,
            "reference_nfe": {a.resolution: evaluations(a, x, log_q) for a in levels},
            "settings": "flow matching, one block",
            "reference_settings": PUBLISHED,
        }
        if name == "float32":
            row["share_of_convolutions"] = _share(seconds["bare"], factor, seconds[name])
        rows.append(row)
    return rows
