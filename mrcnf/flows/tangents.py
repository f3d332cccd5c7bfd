"""Dual numbers: values and the tangents that travel with them, forward-mode derivatives.

A convolution is linear, so one call serves value and tangents alike; an activation gives
act(y) and act'(y)·e. The plain forward pass is the case of no tangents, so a network is
written once. Rules that one network alone needs stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(eq=False)
class Dual:
    """A value (N, C, H, W) and its tangents (K, N, C, H, W), or None."""

    value: Tensor
    tangents: Tensor | None = None

    def linear(self, f: Callable[[Tensor], Tensor], bias: Tensor | None = None) -> Dual:
        """Apply a linear map to everything in one call; `bias` goes to the value alone."""
        if self.tangents is None:
            value = f(self.value)
            return Dual(value if bias is None else value + bias)
        k, n = self.tangents.shape[:2]
        out = f(torch.cat((self.value, self.tangents.flatten(0, 1))))
        value, tangents = out[:n], out[n:].unflatten(0, (k, n))
        return Dual(value if bias is None else value + bias, tangents)

    def map(self, value: Tensor, slope: Callable[[], Tensor]) -> Dual:
        """An element-wise function of this, from its value and its derivative."""
        return Dual(value, None if self.tangents is None else slope() * self.tangents)

    def chunk(self, pieces: int) -> list[Dual]:
        """Cut into equal pieces by channel."""
        values = self.value.chunk(pieces, 1)
        if self.tangents is None:
            return [Dual(value) for value in values]
        tangents = self.tangents.chunk(pieces, 2)
        return [Dual(*both) for both in zip(values, tangents, strict=True)]

    def silu(self) -> Dual:
        """x·σ(x), element by element."""
        if self.tangents is None:
            return Dual(F.silu(self.value))
        gate = torch.sigmoid(self.value)
        value = self.value * gate
        return Dual(value, (gate + value * (1 - gate)) * self.tangents)

    def channels_last(self) -> Dual:
        """The same in the memory format that convolutions are fastest in, on CPUs and GPUs."""
        value = self.value.contiguous(memory_format=torch.channels_last)
        if self.tangents is None:
            return Dual(value)
        k = len(self.tangents)
        flat = self.tangents.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return Dual(value, flat.unflatten(0, (k, -1)))

    def scale(self, factor: Tensor) -> Dual:
        return Dual(self.value * factor, None if self.tangents is None else self.tangents * factor)

    def shift(self, offset: Tensor) -> Dual:
        return Dual(self.value + offset, self.tangents)

    def __add__(self, other: Dual) -> Dual:
        if self.tangents is None:
            return Dual(self.value + other.value)
        assert other.tangents is not None
        return Dual(self.value + other.value, self.tangents + other.tangents)

    def __mul__(self, other: Dual) -> Dual:
        value = self.value * other.value
        if self.tangents is None:
            return Dual(value)
        assert other.tangents is not None
        return Dual(value, self.value * other.tangents + self.tangents * other.value)

    def cat(self, other: Dual) -> Dual:
        """The channels of both."""
        value = torch.cat((self.value, other.value), 1)
        if self.tangents is None:
            return Dual(value)
        assert other.tangents is not None
        return Dual(value, torch.cat((self.tangents, other.tangents), 2))


class Conv(nn.Conv2d):
    """A convolution of a dual."""

    def forward(self, y: Dual) -> Dual:  # type: ignore[override]
        if y.tangents is None:
            return Dual(super().forward(y.value))
        assert self.bias is not None
        return y.linear(
            lambda x: self._conv_forward(x, self.weight, None), self.bias[:, None, None]
        )


def normalise(y: Dual) -> Dual:
    """Divide by the root mean square over channels, pixel by pixel."""
    inverse = torch.rsqrt(y.value.square().mean(-3, keepdim=True) + 1e-6)
    value = y.value * inverse
    if y.tangents is None:
        return Dual(value)
    radial = (value * y.tangents).mean(-3, keepdim=True)
    return Dual(value, (y.tangents - value * radial) * inverse)


def mix(matrix: Tensor, values: Tensor) -> Tensor:
    """A matrix (C', C) applied to the channels of (N, C, H, W), in full precision."""
    with torch.autocast(values.device.type, enabled=False):
        # Far faster than a 1×1 convolution of few channels on CPUs.
        return torch.einsum("ij,njhw->nihw", matrix.to(values.dtype), values)
