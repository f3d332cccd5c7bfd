"""The times t at which flow matching regresses velocities."""

from __future__ import annotations

import torch
from torch import Tensor

from mrcnf.errors import UserError
from mrcnf.runs.settings import LOGIT_MEAN, LOGIT_STD, TIMES

SHORTEST_TIME = 1e-3
"""Log-uniform times are no shorter, together with the noise of the data."""


def draw_times(
    n: int,
    kind: str,
    noise: Tensor,
    like: Tensor,
    generator: torch.Generator | None = None,
    *,
    centre: float = LOGIT_MEAN,
    spread: float = LOGIT_STD,
) -> Tensor:
    """n times in [0, 1], (n,), stratified over the batch.

    Args:
        kind: of `TIMES`, as `objectives.flow_matching` describes them; "likelihood" draws as
            "log-uniform", its weights are the objective's.
        noise: standard deviation of the noise that the data come with, a scalar.
        like: its type and device are the times'.
        centre, spread: of log t/(1-t) of logit-normal times.

    Raises:
        UserError: an unknown kind.
    """
    if kind not in TIMES:
        raise UserError(f"unknown distribution of times {kind!r}; choose one of {', '.join(TIMES)}")
    order = torch.randperm(n, generator=generator, device=like.device)
    jitter = torch.rand(n, generator=generator, device=like.device, dtype=like.dtype)
    uniform = (order.to(like.dtype) + jitter) / n
    if kind == "uniform":
        return uniform
    if kind == "logit-normal":
        return (centre + spread * torch.special.ndtri(uniform)).sigmoid()
    lowest = noise.clamp_min(SHORTEST_TIME)
    log_uniform = (lowest.log() * (1 - uniform)).exp()
    log_uniform = ((log_uniform - noise) / (1 - noise)).clamp(0, 1)
    if kind != "mixed":
        return log_uniform
    alternate = torch.arange(n, device=like.device) % 2 == 0
    return torch.where(alternate, uniform, log_uniform)
