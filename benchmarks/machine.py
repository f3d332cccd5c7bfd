"""How near the machine's limit: bare convolutions of the same shapes, and the FLOP of a step."""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Work, wait
from mrcnf.model import Level
from mrcnf.velocity import PaperField


def flop(work: Work) -> int:
    """Floating-point operations of the convolutions (2 a multiplication) in one run."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def throughput(
    level: Level,
    batch: int,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
) -> float:
    """FLOP/s of the level's hidden convolutions, forward and backward, with nothing between."""
    field = level.flow.fields[0]
    assert isinstance(field, PaperField) and isinstance(field.layers[1], nn.Conv2d)
    weight = field.layers[1].weight[:, 1:].detach().to(dtype)
    weight = weight.contiguous(memory_format=memory_format).requires_grad_()
    shape = (batch, weight.shape[1], *level.shape[1:])
    x = torch.randn(shape, device=weight.device).to(dtype)
    x = x.contiguous(memory_format=memory_format).requires_grad_()

    def run() -> None:
        out = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(out, (x, weight), out.detach())

    work = flop(run)
    seconds = []
    inner = max(1, int(2e9 // work))
    for _ in range(repeats + 1):
        wait(x.device)
        started = time.perf_counter()
        for _ in range(inner):
            run()
        wait(x.device)
        seconds.append((time.perf_counter() - started) / inner)
    return work / statistics.median(seconds[1:])
