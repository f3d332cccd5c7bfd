"""Velocity fields f(t, y | coarse): the networks that move pixels to noise.

Every layer here works on a `Stack`: a value and, when a trace is wanted, K tangents that
travel with it. A convolution is linear, so one call serves value and tangents alike; an
activation gives act(y) and act'(y)·e. The plain forward pass is the case of no tangents, so
a field is written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mrcnf.errors import UserError


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


class _SoftplusPair(torch.autograd.Function):
    """softplus(h + bias) over the first n rows, its slope times the other K·n: one pass each way.

    Saves the slope alone instead of what softplus, sigmoid and a product would, and spares
    their backward passes and those of slices.
    """

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, bias: Tensor, n: int) -> Tensor:
        h, tangents = stacked[:n] + bias, stacked[n:].unflatten(0, (-1, n))
        slope = torch.sigmoid(h)
        ctx.save_for_backward(slope, tangents)
        ctx.bias_shape = bias.shape
        return torch.cat((F.softplus(h), (slope * tangents).flatten(0, 1)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        slope, tangents = ctx.saved_tensors
        value, pushed = grad[: len(slope)], grad[len(slope) :].unflatten(0, tangents.shape[:2])
        bent = slope * torch.addcmul(value, 1 - slope, (pushed * tangents).sum(0))
        stacked = torch.cat((bent, (slope * pushed).flatten(0, 1)))
        return stacked, bent.sum_to_size(ctx.bias_shape), None


class Field(nn.Module):
    """Base of the velocity fields: subclasses define `run`, and `context` if they wish.

    f(t, y) takes y (N, C, H, W) and t, a scalar or (N,), and returns the velocity, shaped as
    y. `context` turns a coarse image into what `run` wants of it, once per solve.
    """

    def context(self, coarse: Tensor | None) -> Tensor | None:
        return coarse

    def run_parameters(self) -> list[Tensor]:
        """The parameters that `run` uses: all but those that `context` is made with.

        The continuous adjoint differentiates by these and by the context, which hands its
        gradient on; given the context's own parameters as well, it would count them twice.
        """
        return list(self.parameters())

    def run(self, t: Tensor, stack: Stack, context: Tensor | None) -> Stack:
        raise TypeError(f"{type(self).__name__} does not define run()")

    def hidden_weights(self) -> list[nn.Parameter]:
        """The convolution weights between hidden layers, which Muon may train."""
        return []

    def forward(self, t: Tensor, y: Tensor, coarse: Tensor | None = None) -> Tensor:
        return self.run(t, Stack(y, None), self.context(coarse)).value


class Conditioned:
    """A field with its coarse image bound: the f(t, y) that solvers and traces see."""

    def __init__(self, field: Field, coarse: Tensor | None) -> None:
        self.field, self.context = field, field.context(coarse)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.field.run(t, Stack(y, None), self.context).value

    def push(self, t: Tensor, y: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """f(t, y) and J·e for tangents (K, N, …), in one pass."""
        value, pushed = self.field.run(t, Stack(y, tangents), self.context)
        assert pushed is not None
        return value, pushed


class PaperField(Field):
    """The paper's network: 3×3 convolutions with softplus, time at every layer.

    Time enters as a constant extra channel (the first of each layer's weights), the coarse
    image as further channels of the first layer; the last layer starts at zero. A constant
    channel t through a zero-padded convolution is t times a fixed map, and that map is what
    is added here. 79,134 parameters for a base block of three channels, 87,834 for a detail
    block (arXiv 2106.08462, appendix; the sizes of its tables).

    Args:
        channels: of y.
        coarse_channels: of the coarse image, 0 for a base level.
        hidden: widths of the hidden layers.
    """

    def __init__(
        self, channels: int, coarse_channels: int = 0, hidden: tuple[int, ...] = (64, 64, 64)
    ) -> None:
        super().__init__()
        widths = (channels + coarse_channels, *hidden, channels)
        self.layers = nn.ModuleList(
            nn.Conv2d(1 + before, after, 3, padding=1)
            for before, after in pairwise(widths)
        )
        last = self.layers[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def hidden_weights(self) -> list[nn.Parameter]:
        return [layer.weight for layer in self.layers[1:-1]]  # type: ignore[misc]

    def run(self, t: Tensor, stack: Stack, context: Tensor | None) -> Stack:
        y, tangents = stack
        n, clock = len(y), t.reshape(-1, 1, 1, 1).to(y.dtype)
        ones, bias = y.new_ones(1, 1, *y.shape[2:]), y
        h = y if tangents is None else torch.cat((y, tangents.flatten(0, 1)))
        h = h.contiguous(memory_format=torch.channels_last)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            if i > 0:
                h = F.softplus(h + bias) if tangents is None else _SoftplusPair.apply(h, bias, n)
            w_time, weight, w_coarse = layer.weight.split(
                (1, h.shape[1], layer.in_channels - 1 - h.shape[1]), dim=1
            )
            time_map = F.conv2d(ones, w_time, padding=1)
            bias = torch.addcmul(layer.bias[:, None, None], clock, time_map)
            if i == 0 and context is not None:
                bias = bias + F.conv2d(context, w_coarse, padding=1)
            h = F.conv2d(h, weight, padding=1)
        return Stack(h[:n] + bias, None if tangents is None else h[n:].unflatten(0, (-1, n)))


class ResidualField(Field):
    """The default network: residual blocks, modulated by time and by the coarse image.

    Time, as features of log t/(1-t), scales and shifts every block; the coarse image goes
    through convolutions of its own, once per solve, and is added inside every block. The
    output is preconditioned for standardised data: with s² = (1-t)² + t²,

        f(t, y) = (2t-1)/s² · y + F(t, y/s)/s

    where the first term is the best linear prediction of z - y from (1-t)·y + t·z and F is
    left with a target of unit variance; F = 0 transports a standard normal to itself (the
    construction of Karras et al. 2022, §5, carried over to straight paths).

    With several scales the blocks form a U: `depth` of them at each scale on the way down and
    again on the way up, at each scale twice as wide on half the side.

    Args:
        channels: of y.
        coarse_channels: of the coarse image, 0 for a base level.
        width: channels of the hidden layers at the full scale.
        depth: number of residual blocks, of two 3×3 convolutions each (at every scale, see above).
        scales: 1 works at full scale throughout.
        attention: self-attention over positions after each block of the smallest scale.
    """

    def __init__(
        self,
        channels: int,
        coarse_channels: int = 0,
        width: int = 48,
        depth: int = 4,
        scales: int = 1,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.smallest = width, scales - 1
        way_down = [scale for scale in range(self.smallest) for _ in range(depth)]
        self.plan = [*way_down, *[self.smallest] * depth, *reversed(way_down)]
        self.widths = [width * 2**scale for scale in self.plan]
        self.first = Conv(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(w) for w in self.widths)
        sizes = list(pairwise(width * 2**scale for scale in range(scales)))
        self.down = nn.ModuleList(Conv(fine, small, 2, stride=2) for fine, small in sizes)
        self.up = nn.ModuleList(Conv(small, fine, 1) for fine, small in sizes)
        self.attention = nn.ModuleList(
            _Attention(width * 2**self.smallest) for _ in range(depth if attention else 0)
        )
        self.last = Conv(width, channels, 3, padding=1)
        self.time = nn.Sequential(
            nn.Linear(TIME_FEATURES, 2 * width), nn.SiLU(),
            nn.Linear(2 * width, 2 * sum(self.widths)),
        )  # fmt: skip
        self.coarse = (
            nn.Sequential(
                nn.Conv2d(coarse_channels, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width + sum(self.widths), 1),
            )
            if coarse_channels
            else None
        )
        for layer in (self.last, self.time[-1]):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def context(self, coarse: Tensor | None) -> Tensor | None:
        return None if self.coarse is None else self.coarse(coarse)

    def run_parameters(self) -> list[Tensor]:
        return [p for name, p in self.named_parameters() if not name.startswith("coarse.")]

    def hidden_weights(self) -> list[nn.Parameter]:
        outer = {"first.weight", "last.weight", "coarse.0.weight"}
        return [p for name, p in self.named_parameters() if p.dim() == 4 and name not in outer]

    def run(self, t: Tensor, stack: Stack, context: Tensor | None) -> Stack:
        y, stack = stack.value, stack.channels_last()
        t = t.to(y.dtype)
        clock = t.reshape(-1, 1, 1, 1)
        variance = (1 - clock) ** 2 + clock**2
        spread = variance.rsqrt()
        scales, shifts = self.time(time_features(t.reshape(-1)))[:, :, None, None].chunk(2, dim=1)
        hidden = self.first(stack.scale(spread))
        maps: Sequence[Tensor] = ()
        if context is not None:
            entry, *maps = context.split([self.width, *self.widths], dim=1)
            hidden = hidden.shift(entry)
        attention, skipped, now = iter(self.attention), [], 0
        for i, (scale, shift) in enumerate(
            zip(scales.split(self.widths, 1), shifts.split(self.widths, 1), strict=True)
        ):
            if self.plan[i] > now:
                skipped.append(hidden)
                hidden = self.down[now](hidden)
            elif self.plan[i] < now:
                wide = self.up[now - 1](hidden)
                hidden = wide.linear(lambda x: F.interpolate(x, scale_factor=2)).add(skipped.pop())
            now = self.plan[i]
            if maps:
                shift = shift + (F.avg_pool2d(maps[i], 2**now) if now else maps[i])
            hidden = self.blocks[i](hidden, 1 + scale, shift)
            if now == self.smallest and self.attention:
                hidden = next(attention)(hidden)
        out = self.last(normalise(hidden).silu())
        return stack.scale((2 * clock - 1) / variance).add(out.scale(spread))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Conv(width, width, 3, padding=1)
        self.outer = Conv(width, width, 3, padding=1)
        with torch.no_grad():
            self.outer.weight *= 0.3

    def forward(self, hidden: Stack, scale: Tensor, shift: Tensor) -> Stack:
        inner = self.inner(normalise(hidden).silu())
        return hidden.add(self.outer(inner.scale(scale).shift(shift).silu()))


class _Attention(nn.Module):
    """Self-attention over all positions, added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
        self.inner = Conv(width, 3 * width, 1)
        self.outer = Conv(width, width, 1)
        with torch.no_grad():
            self.outer.weight *= 0.3

    def forward(self, hidden: Stack) -> Stack:
        side = hidden.value.shape[-2:]
        value, tangents = self.inner(normalise(hidden))
        q, k, v = self._split(value)
        scale = q.shape[-1] ** -0.5
        # Written out: PyTorch's fused attention has no forward-mode derivative.
        weights = (q @ k.mT * scale).softmax(-1)
        pushed = None
        if tangents is not None:
            dq, dk, dv = self._split(tangents)
            slope = (dq @ k.mT + q @ dk.mT) * scale
            slope = weights * (slope - (weights * slope).sum(-1, keepdim=True))
            pushed = self._join(slope @ v + weights @ dv, side)
        return hidden.add(self.outer(Stack(self._join(weights @ v, side), pushed)))

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(…, 3·C, H, W) → queries, keys and values, (…, heads, H·W, C/heads) each."""
        return x.flatten(-2).unflatten(-2, (3, self.heads, -1)).mT.unbind(-4)

    def _join(self, x: Tensor, side: torch.Size) -> Tensor:
        return x.mT.flatten(-3, -2).unflatten(-1, side)


TIME_FEATURES = 17
_TIME_EDGE = 1e-3


def time_features(t: Tensor) -> Tensor:
    """(N,) times → (N, 17): log t/(1-t), held constant outside [0, 1], and its harmonics."""
    t = t.clamp(0, 1)
    log_odds = ((t + _TIME_EDGE) / (1 - t + _TIME_EDGE)).log() / 7.0
    angles = log_odds[:, None] * (math.pi / 2) * torch.arange(1, 9, device=t.device, dtype=t.dtype)
    return torch.cat((log_odds[:, None], angles.sin(), angles.cos()), dim=1)


FIELDS = ("residual", "paper")


def build(
    kind: str,
    channels: int,
    coarse_channels: int = 0,
    width: int = 48,
    depth: int = 4,
    scales: int = 1,
    attention: bool = False,
) -> Field:
    """A field by name: "residual" (all arguments), or "paper" (width of its three layers)."""
    if kind == "residual":
        return ResidualField(channels, coarse_channels, width, depth, scales, attention)
    if kind == "paper":
        return PaperField(channels, coarse_channels, (width,) * 3)
    raise UserError(f"unknown velocity field {kind!r}; choose one of {', '.join(FIELDS)}")
