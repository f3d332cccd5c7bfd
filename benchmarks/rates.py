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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import mrcnf
from benchmarks.machine import flop
from benchmarks.timing import alternate
from benchmarks.workload import images
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.residual_field import ResidualField
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.runs.settings import TrainConfig
from mrcnf.training.objectives import flow_matching, likelihood
from mrcnf.training.update import Update

Work = Callable[[], object]
KINDS = {
    "convolution": "convolutions",
    "cpp_fused": "element-wise, fused",
    "triton": "element-wise, fused",
    "adam": "optimiser",
    "muon": "optimiser",
    "Muon": "optimiser",
    "mm": "matrix products (Muon, time's network)",
}
"""What the profiler's names stand for, by a part of them; all others are `OTHER`."""
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
    found, source = images(mrcnf.load(options.run).config.finest, options.batch)
    x, log_q = (
        part.to(device) for part in dequantise(found, generator=torch.Generator().manual_seed(0))
    )

    def fresh(compiled: bool) -> Level:
        level = mrcnf.load(options.run, device=device).level(options.level)
        level.requires_grad_()
        if compiled:
            level.compile()
        return level

    plain = fresh(False)
    works = {
        "flow matching step, bfloat16, compiled": _training_step(fresh(True), x),
        "flow matching step, bfloat16": _training_step(fresh(False), x),
        "likelihood step, float32, compiled": _likelihood_step(fresh(True), x, log_q),
        "likelihood step, float32": _likelihood_step(fresh(False), x, log_q),
        "evaluation, float32, compiled": _evaluation(fresh(True), x),
        "evaluation, float32": _evaluation(fresh(False), x),
    }
    needed = {
        "flow": flop(_training_step(fresh(False), x)),
        "like": flop(_likelihood_step(plain, x, log_q)),
        "eval": flop(_evaluation(fresh(False), x)),
    }
    bares = {
        "flow": _bare(plain, x, torch.bfloat16, backward=True),
        "like": _bare(plain, x, torch.float32, backward=True),
        "eval": _bare(plain, x, torch.float32, backward=False),
    }
    seconds = alternate(works | bares, device, options.repeats)
    print(f"level {options.level} of {options.run}, {len(x)} images of {source}, {device}")
    print("| work | seconds | GFLOP/s | bare convolutions | share |\n|---|---|---|---|---|")
    for name in works:
        kind = name[:4]
        taken = statistics.median(seconds[name])
        rate = needed[kind] / taken
        bare = flop(bares[kind]) / statistics.median(seconds[kind])
        print(
            f"| {name} | {taken:.3f} | {rate / 1e9:.0f} | {bare / 1e9:.0f} | {rate / bare:.0%} |",
            flush=True,
        )
    for name, work in works.items():
        if name.endswith(", compiled"):
            print(f"\n{name}: where its time goes")
            for what, share in _profile(work, device):
                print(f"  {share:4.0%} {what}")


def _training_step(level: Level, x: Tensor) -> Work:
    level.train()
    update, generator = Update(level, TrainConfig(precision="bfloat16")), torch.Generator(x.device)

    def work() -> None:
        update.optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss, _ = flow_matching(level, x, generator=generator)
        loss.backward()
        update.apply(1000, 1e-4)

    return work


def _likelihood_step(level: Level, x: Tensor, log_q: Tensor) -> Work:
    level.train()
    generator = torch.Generator(x.device)
    solver = Solver("midpoint", 2, 2.0)

    def work() -> None:
        level.zero_grad()
        loss, _ = likelihood(
            level, x, log_q, solver=solver, trace=Trace(), kinetic=0.0, frobenius=0.0,
            generator=generator,
        )  # fmt: skip
        loss.backward()

    return work


def _evaluation(level: Level, x: Tensor) -> Work:
    level.eval()
    generator, solver = torch.Generator(x.device), replace(level.solver, steps=2)

    @torch.no_grad()
    def work() -> None:
        level.log_prob(x, solver=solver, generator=generator)

    return work


def _bare(level: Level, x: Tensor, dtype: torch.dtype, *, backward: bool) -> Work:
    """One hidden convolution of the field, and its gradients or not, with nothing around it."""
    assert isinstance(level.flow, ContinuousFlow)
    field = next(iter(level.flow))
    assert isinstance(field, ResidualField)
    inner = field.blocks[0].get_submodule("inner")
    assert isinstance(inner, nn.Conv2d)
    weight = inner.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
    _, *positions = level.latent_shape(*x.shape[2:])
    y = torch.randn(len(x), weight.shape[1], *positions, device=x.device).to(dtype)
    y = y.contiguous(memory_format=torch.channels_last)
    if backward:
        weight.requires_grad_()
        y.requires_grad_()

    def work() -> None:
        out = F.conv2d(y, weight, padding=1)
        if backward:
            torch.autograd.grad(out, (y, weight), out.detach())

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
