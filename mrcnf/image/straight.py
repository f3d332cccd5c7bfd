"""Gradients through roundings, where they are asked for: straight-through estimates.

A rounding's own derivative is zero, and so it stays for whoever differentiates a model. Who looks
for pixels that raise its loss asks for `roundings_pass`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_passing = ContextVar("passing", default=False)


@contextmanager
def roundings_pass() -> Iterator[None]:
    """Within: gradients pass through `straight` and `floor` as if nothing were rounded."""
    before = _passing.set(True)
    try:
        yield
    finally:
        _passing.reset(before)


def asked_for() -> bool:
    """Whether this is within `roundings_pass`."""
    return _passing.get()


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, smooth: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def straight(value: Tensor, smooth: Tensor) -> Tensor:
    """`value`; within `roundings_pass` with the gradient of `smooth` (Bengio et al. 2013, §4).

    >>> x = torch.tensor([0.25, 1.75], requires_grad=True)
    >>> with roundings_pass():
    ...     y = straight(x.floor(), 2 * x)
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([0.0, 1.0], [2.0, 2.0])
    """
    if not (asked_for() and smooth.requires_grad):
        return value
    found: Tensor = _Straight.apply(value.detach(), smooth)
    return found


def floor(x: Tensor) -> Tensor:
    """⌊x⌋; within `roundings_pass` with the gradient of x."""
    return straight(x.floor(), x)
