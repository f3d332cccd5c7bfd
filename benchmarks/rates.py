"""What share of bare convolutions' rate the work on one level reaches, and what takes the rest.

    OMP_NUM_THREADS=1 python -m benchmarks.rates experiments/models/cifar10 --level 32 --batch 32

Takes turns, in one process, between bare hidden convolutions of the level's field and its work: a
training step of flow matching (bfloat16, compiled, with the optimiser's update), a likelihood step
differentiated through the solver (float32), and an evaluation (float32), compiled and not. A share
is the time that the work's FLOP would take at the bare rate, over the time that it takes.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import mrcnf
from benchmarks.machine import bare, flop
from benchmarks.steps import likelihood_step, match_step
from benchmarks.timing import Work, alternate
from benchmarks.workload import images
from mrcnf.flows.solve import Solver
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.runs.settings import TrainConfig
from mrcnf.training.update import Update

KINDS = {
    "convolution": "convolutions",
    "triton": "element-wise, fused",
    "adam": "optimiser",
    "Muon": "optimiser",
    "mm": "matrix products (Muon, time's network)",
}
"""What the profiler's names stand for, by a part of them; all others are `OTHER`. On a CPU compiled
code has no names of its own."""
OTHER = "element-wise, copies, Python's calls"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of a trained model")
    parser.add_argument("--level", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)

    def fresh(compiled: bool) -> Level:
        level = mrcnf.load(options.run, device=device).level(options.level)
        level.requires_grad_()
        if compiled:
            level.compile()
        return level

    level = fresh(False)
    found, source = images(level.model.finest, options.batch)
    x, log_q = (
        part.to(device) for part in dequantise(found, generator=torch.Generator().manual_seed(0))
    )
    # Of each work: how to make it of a level, and what its convolutions are.
    makers: dict[str, tuple[Callable[[Level], Work], torch.dtype, bool]] = {
        "flow matching step, bfloat16": (partial(_training_step, x=x), torch.bfloat16, True),
        "likelihood step, float32": (
            lambda level: partial(likelihood_step, level.train(), x, log_q, SHORT),
            torch.float32, True,
        ),
        "evaluation, float32": (partial(_evaluation, x=x), torch.float32, False),
    }  # fmt: skip
    works, bares, needed = dict[str, Work](), dict[str, Work](), dict[str, int]()
    for name, (make, dtype, backward) in makers.items():
        works[f"{name}, compiled"], works[name] = make(fresh(True)), make(fresh(False))
        bares[f"bare, {name}"] = bare(level, len(x), dtype=dtype, backward=backward)
        needed[name] = flop(make(fresh(False)))
    seconds = alternate(works | bares, device, options.repeats)
    taken = {name: statistics.median(laps) for name, laps in seconds.items()}
    print(f"level {options.level} of {options.run}, {len(x)} images of {source}, {device}")
    print("| work | seconds | GFLOP/s | bare convolutions | share |\n|---|---|---|---|---|")
    for name in works:
        kind = name.removesuffix(", compiled")
        rate, alone = needed[kind] / taken[name], f"bare, {kind}"
        most = flop(bares[alone]) / taken[alone]
        print(
            f"| {name} | {taken[name]:.3f} | {rate / 1e9:.0f} | {most / 1e9:.0f} | "
            f"{rate / most:.0%} |"
        )
    for name, work in works.items():
        if name.endswith(", compiled"):
            print(f"\n{name}: where its time goes")
            for what, share in _profile(work, device):
                print(f"  {share:4.0%} {what}")


SHORT = Solver("midpoint", 2, 2.0)
"""Of the steps whose rate is measured, which does not depend on how many they are."""


def _training_step(level: Level, x: Tensor) -> Work:
    update = Update(level.train(), TrainConfig())

    def work() -> None:
        match_step(level, x, half=True)
        update.apply(1000, 1e-4)

    return work


def _evaluation(level: Level, x: Tensor) -> Work:
    level.eval()
    generator, solver = torch.Generator(x.device), replace(level.solver, steps=SHORT.steps)

    @torch.no_grad()
    def work() -> None:
        level.log_prob(x, solver=solver, generator=generator)

    return work


def _profile(work: Work, device: torch.device) -> list[tuple[str, float]]:
    """Shares of a work's time by kind, the largest first."""
    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    work()
    with profile(activities=kinds) as found:
        work()
    spent: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        kind = next((kind for part, kind in KINDS.items() if part in event.key), OTHER)
        spent[kind] += own
    total = sum(spent.values())
    return sorted(((kind, time / total) for kind, time in spent.items()), key=lambda row: -row[1])


if __name__ == "__main__":
    main()
