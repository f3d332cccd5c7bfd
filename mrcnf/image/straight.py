"""Gradients through roundings, which have none: straight-through estimates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, smooth: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def straight(value: Tensor, smooth: Tensor) -> Tensor:
    """`value` to the bit, with the gradient of `smooth`, shaped alike (Bengio et al. 2013, §4).

    >>> x = torch.tensor([0.25, 1.75], requires_grad=True)
    >>> y = straight(x.floor(), 2 * x)
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([0.0, 1.0], [2.0, 2.0])
    """
    if not smooth.requires_grad:
        return value
    found: Tensor = _Straight.apply(value.detach(), smooth)
    return found


def floor(x: Tensor) -> Tensor:
    """⌊x⌋, with the gradient of x."""
    return straight(x.floor(), x)
