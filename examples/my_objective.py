"""An objective of one's own: from a level and dequantised images to a loss."""

import torch
from torch import Tensor

import mrcnf


def matching(
    level: mrcnf.Level,
    x: Tensor,
    log_q: Tensor,
    *,
    generator: torch.Generator,
    emphasis: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow matching on straight paths, errors near the data counting more.

    Args:
        level: with its flow; `level.prepare` gives what that models, and its condition.
        x, log_q: dequantised images (N, C, H, W), and the log-density (N,) of their noise.
        generator: of everything that is random, so that runs repeat and resume.
        emphasis: of t = 0 over t = 1: what `[train.options]` holds comes here.

    Returns:
        the loss to minimise, and what else is to be in metrics.jsonl; the loss alone will do.
    """
    y, condition, _ = level.prepare(x)
    t = torch.rand(len(y), generator=generator, device=y.device, dtype=y.dtype)
    z = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    along = t[:, None, None, None]
    velocity = level.flow.velocity(t, (1 - along) * y + along * z, condition)
    errors = (velocity - (z - y)).square().flatten(1).mean(1)
    return (errors * (1 + emphasis * (1 - t))).mean(), {"plain": errors.mean()}
