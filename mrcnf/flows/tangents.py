"""Values and the tangents that travel with them: forward-mode derivatives of a network.

A convolution is linear, so one call serves value and tangents alike; an activation gives
act(y) and act'(y)·e. The plain forward pass is the case of no tangents, so a network is
written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stack(NamedTuple):
    """A value (N, C, H, W) and its tangents (K, N, C, H, W), or None."""

    value: Tensor
    tangents: Tensor | None

    def linear(self, f: Callable[[Tensor], Tensor], bias: Tensor | None = None) -> Stack:
        """Apply a linear map to everything in one call; `bias` goes to the value alone."""
        if self.tangents is None:
            value = f(self.value)
            return Stack(value if bias is None else value + bias, None)
        k, n = self.tangents.shape[:2]
        out = f(torch.cat((self.value, self.tangents.flatten(0, 1))))
        value, tangents = out[:n], out[n:].unflatten(0, (k, n))
        return Stack(value if bias is None else value + bias, tangents)

    def map(self, value: Tensor, slope: Callable[[], Tensor]) -> Stack:
        """An element-wise function of this stack, from its value and its derivative."""
        return Stack(value, None if self.tangents is None else slope() * self.tangents)

    def chunk(self, pieces: int) -> list[Stack]:
        """Cut into equal pieces by channel."""
        values = self.value.chunk(pieces, 1)
        if self.tangents is None:
            return [Stack(value, None) for value in values]
        tangents = self.tangents.chunk(pieces, 2)
        return [Stack(*both) for both in zip(values, tangents, strict=True)]

    def silu(self) -> Stack:
        """x·σ(x), element by element."""
        if self.tangents is None:
            return Stack(F.silu(self.value), None)
        gate = torch.sigmoid(self.value)
        value = self.value * gate
        return Stack(value, (gate + value * (1 - gate)) * self.tangents)

    def channels_last(self) -> Stack:
        """The same in the memory format that convolutions are fastest in, on CPUs and GPUs."""
        value = self.value.contiguous(memory_format=torch.channels_last)
        if self.tangents is None:
            return Stack(value, None)
        k = len(self.tangents)
        flat = self.tangents.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return Stack(value, flat.unflatten(0, (k, -1)))

    def scale(self, factor: Tensor) -> Stack:
        return Stack(self.value * factor, None if self.tangents is None else self.tangents * factor)

    def shift(self, offset: Tensor) -> Stack:
        return Stack(self.value + offset, self.tangents)

    def add(self, other: Stack) -> Stack:
        if self.tangents is None or other.tangents is None:
            return Stack(self.value + other.value, None)
        return Stack(self.value + other.value, self.tangents + other.tangents)

    def multiply(self, other: Stack) -> Stack:
        value = self.value * other.value
        if self.tangents is None:
            return Stack(value, None)
        assert other.tangents is not None
        return Stack(value, self.value * other.tangents + self.tangents * other.value)

    def cat(self, other: Stack) -> Stack:
        """The channels of both."""
        value = torch.cat((self.value, other.value), 1)
        if self.tangents is None:
            return Stack(value, None)
        assert other.tangents is not None
        return Stack(value, torch.cat((self.tangents, other.tangents), 2))


class Conv(nn.Conv2d):
    """A convolution on a stack."""

    def forward(self, stack: Stack) -> Stack:  # type: ignore[override]
        if stack.tangents is None:
            return Stack(super().forward(stack.value), None)
        assert self.bias is not None
        return stack.linear(
            lambda x: self._conv_forward(x, self.weight, None), self.bias[:, None, None]
        )


def normalise(stack: Stack) -> Stack:
    """Divide by the root mean square over channels, pixel by pixel."""
    inverse = torch.rsqrt(stack.value.square().mean(-3, keepdim=True) + 1e-6)
    value = stack.value * inverse
    if stack.tangents is None:
        return Stack(value, None)
    radial = (value * stack.tangents).mean(-3, keepdim=True)
    return Stack(value, (stack.tangents - value * radial) * inverse)


def mix(matrix: Tensor, values: Tensor) -> Tensor:
    """A matrix (C', C) applied to the channels of (N, C, H, W), in full precision."""
    with torch.autocast(values.device.type, enabled=False):
        # Far faster than a 1×1 convolution of few channels on CPUs.
        return torch.einsum("ij,njhw->nihw", matrix.to(values.dtype), values)
