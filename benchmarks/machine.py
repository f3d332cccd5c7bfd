"""How near the machine's limit: bare convolutions of the same shapes, and the FLOP of a step."""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Work, wait
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.paper_field import PaperField
from mrcnf.model.level import Level


def flop(work: Work) -> int:
    """Floating-point operations of the convolutions (2 a multiplication) in one run."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def bare(
    level: Level,
    batch: int,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float32,
) -> Work:
    """One hidden convolution of the level, forward and backward, with nothing around it."""
    assert isinstance(level.flow, ContinuousFlow)
    field = next(iter(level.flow))
    assert isinstance(field, PaperField) and isinstance(field.layers[1], nn.Conv2d)
    weight = field.layers[1].weight[:, 1:].detach().to(dtype)
    weight = weight.contiguous(memory_format=memory_format).requires_grad_()
    _, *positions = level.latent_shape(level.model.finest, level.model.finest)
    shape = (batch, weight.shape[1], *positions)
    x = torch.randn(shape, device=weight.device).to(dtype)
    x = x.contiguous(memory_format=memory_format).requires_grad_()

    def run() -> None:
        out = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(out, (x, weight), out.detach())

    return run


def share_of(steps: list[tuple[Level, Work]], batch: int) -> tuple[Work, float]:
    """Bare convolutions to time in turn with a step of several levels, and a factor.

    Factor times their seconds is what the step would take if all its FLOP went at their rate.
    They are a sixteenth of the step, level by level.
    """
    convolutions = [bare(level, batch) for level, _ in steps]
    needed = [flop(step) for _, step in steps]
    each = [flop(run) for run in convolutions]
    counts = [max(1, round(n / e / 16)) for n, e in zip(needed, each, strict=True)]

    def run() -> None:
        for convolution, count in zip(convolutions, counts, strict=True):
            for _ in range(count):
                convolution()

    return run, sum(needed) / sum(c * e for c, e in zip(counts, each, strict=True))


def rate(run: Work, device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of a short work."""
    work = flop(run)
    seconds = []
    inner = max(1, int(2e9 // work))
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        for _ in range(inner):
            run()
        wait(device)
        seconds.append((time.perf_counter() - started) / inner)
    return work / statistics.median(seconds[1:])
