"""How near the machine's limit: bare convolutions of the same shapes, and the FLOP of a step."""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
    backward: bool = True,
) -> Work:
    """One hidden convolution of the level's field, forward and backward, with nothing around it."""
    weight = _hidden_weight(level).to(dtype).contiguous(memory_format=memory_format)
    _, *positions = level.latent_shape(level.model.finest, level.model.finest)
    x = torch.randn(batch, weight.shape[1], *positions, device=weight.device).to(dtype)
    x = x.contiguous(memory_format=memory_format)
    weight.requires_grad_(backward)
    x.requires_grad_(backward)

    def run() -> None:
        out = F.conv2d(x, weight, padding=1)
        if backward:
            torch.autograd.grad(out, (x, weight), out.detach())

    return run


def _hidden_weight(level: Level) -> Tensor:
    assert isinstance(level.flow, ContinuousFlow)
    field = next(iter(level.flow))
    if not isinstance(field, PaperField):
        return field.hidden_weights()[0].detach()
    hidden = field.layers[1]
    assert isinstance(hidden, nn.Conv2d)
    return hidden.weight[:, 1:].detach()  # the first channel is time


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
