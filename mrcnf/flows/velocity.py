"""Velocity fields f(t, y | coarse): the networks that move pixels to noise.

Every layer works on a `Stack`: a value and, when a trace is wanted, its tangents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mrcnf.errors import UserError
from mrcnf.flows import paths
from mrcnf.flows.tangents import Conv, Stack, mix, normalise


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

    def calibrate(self, noise: Tensor, cells: Tensor) -> None:
        """Learn the units of the data: called whenever a level is standardised.

        Args:
            noise: (C, 1, 1), the standard deviation of the Gaussian noise that y comes with.
            cells: (P, C + C_coarse + 1), the affine map from one position's y, coarse image
                and 1 to the P pixels there, counted in cells from a point of their lattice.
        """

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
    network answers with two numbers per coefficient, F and log q, and the velocity is

        f(t, y) = g·y + m·F,    v = α²q² + β²,    g = (αα'q² + ββ')/v,    m = W·q/√v

    (α, β, W of `paths`). g·y would be the best prediction of the velocity, and m what is left
    to predict, were y normal of standard deviation q: the preconditioning of Karras et al.
    (2022, §5) with a spread that the network finds for itself, as smooth patches and rough
    ones have details of very different size. F = log q = 0 transports a standard normal to
    itself.

    With several scales the blocks form a U: `depth` of them at each scale on the way down and
    again on the way up, at each scale twice as wide on half the side.

    Args:
        channels: of y.
        coarse_channels: of the coarse image, 0 for a base level.
        width: channels of the hidden layers at the full scale.
        depth: number of residual blocks, of two 3×3 convolutions each (at every scale, see above).
        scales: 1 works at full scale throughout.
        attention: self-attention over positions after each block of the smallest scale.
        path: of `paths.PATHS`, what the field is trained on.
        lattice: pixels per position, whose phases on the lattice of integers the field is to
            see (`_Lattice`); 0 for none.
    """

    noise: Tensor

    def __init__(
        self,
        channels: int,
        coarse_channels: int = 0,
        width: int = 48,
        depth: int = 4,
        scales: int = 1,
        attention: bool = False,
        path: str = "straight",
        lattice: int = 0,
    ) -> None:
        super().__init__()
        self.width, self.smallest, self.path = width, scales - 1, path
        way_down = [scale for scale in range(self.smallest) for _ in range(depth)]
        self.plan = [*way_down, *[self.smallest] * depth, *reversed(way_down)]
        self.widths = [width * 2**scale for scale in self.plan]
        self.lattice = _Lattice(channels, coarse_channels, lattice) if lattice else None
        self.first = Conv(channels + 2 * lattice, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(w) for w in self.widths)
        sizes = list(pairwise(width * 2**scale for scale in range(scales)))
        self.down = nn.ModuleList(Conv(fine, small, 2, stride=2) for fine, small in sizes)
        self.up = nn.ModuleList(Conv(small, fine, 1) for fine, small in sizes)
        self.attention = nn.ModuleList(
            _Attention(width * 2**self.smallest) for _ in range(depth if attention else 0)
        )
        self.last = Conv(width, 2 * channels, 3, padding=1)
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
        self.register_buffer("noise", torch.zeros(channels, 1, 1))
        for layer in (self.last, self.time[-1]):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def calibrate(self, noise: Tensor, cells: Tensor) -> None:
        self.noise.copy_(noise)
        if self.lattice is not None:
            self.lattice.calibrate(cells)

    def context(self, coarse: Tensor | None) -> Tensor | None:
        if self.coarse is None or coarse is None:
            return None
        maps = self.coarse(coarse)
        return maps if self.lattice is None else torch.cat((maps, coarse), 1)

    def run_parameters(self) -> list[Tensor]:
        return [p for name, p in self.named_parameters() if not name.startswith("coarse.")]

    def hidden_weights(self) -> list[nn.Parameter]:
        outer = {"first.weight", "last.weight", "coarse.0.weight"}
        return [p for name, p in self.named_parameters() if p.dim() == 4 and name not in outer]

    def run(self, t: Tensor, stack: Stack, context: Tensor | None) -> Stack:
        y, stack = stack.value, stack.channels_last()
        t = t.to(y.dtype)
        path = paths.at(self.path, t.reshape(-1, 1, 1, 1), self.noise)
        scales, shifts = self.time(time_features(t.reshape(-1)))[:, :, None, None].chunk(2, dim=1)
        seen = stack.scale((path.alpha**2 + path.beta**2).rsqrt())
        coarse: Tensor | None = None
        maps: Sequence[Tensor] = ()
        if context is not None:
            used = self.width + sum(self.widths)
            coarse = context[:, used:]
            entry, *maps = context[:, :used].split([self.width, *self.widths], dim=1)
        if self.lattice is not None:
            seen = seen.cat(self.lattice(path, stack, coarse))
        hidden = self.first(seen)
        if context is not None:
            hidden = hidden.shift(entry.to(hidden.value.dtype))
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
                own = maps[i].to(shift.dtype)
                shift = shift + (F.avg_pool2d(own, 2**now) if now else own)
            hidden = self.blocks[i](hidden, 1 + scale, shift)
            if now == self.smallest and self.attention:
                hidden = next(attention)(hidden)
        answer, log_spread = self.last(normalise(hidden).silu()).chunk(2)
        gain, size = _precondition(path, log_spread)
        return stack.multiply(gain).add(answer.multiply(size))


def _precondition(path: paths.Path, log_spread: Stack) -> tuple[Stack, Stack]:
    """g and m of `ResidualField` and their derivatives by log q."""
    alpha, beta, wronskian = path.alpha, path.beta, path.wronskian
    wild = log_spread.value.to(alpha.dtype)
    # Further out squares of variances leave the range of single precision.
    log_spread = log_spread.map(wild.clamp(-15, 15), lambda: (wild.abs() < 15).to(wild.dtype))
    variance = (2 * log_spread.value).exp()
    total = alpha**2 * variance + beta**2
    gain = (alpha * path.alpha_rate * variance + beta * path.beta_rate) / total
    size = wronskian * (variance / total).sqrt()
    return (
        log_spread.map(gain, lambda: -2 * alpha * beta * wronskian * variance / total / total),
        log_spread.map(size, lambda: size * beta**2 / total),
    )


class _Lattice(nn.Module):
    """sin and cos of the pixels' phases on the lattice of integers, for as long as noise lets it
    be seen.

    Dequantised pixels crowd around the lattice's points (Gaussian noise) or break off halfway
    between them (uniform noise); a convolution of values that span 256 points cannot tell
    where it is on that scale (Kingma et al. 2021, appendix C, feed Fourier features of pixels
    for the same reason). The pixels are those that y_t/α and the coarse image make together;
    noise of phase variance s² leaves exp(-s²/2) of a phase's sin and cos to be known, and that
    is what they are multiplied by.
    """

    of_y: Tensor
    of_coarse: Tensor
    offset: Tensor

    def __init__(self, channels: int, coarse_channels: int, pixels: int) -> None:
        super().__init__()
        self.register_buffer("of_y", torch.zeros(pixels, channels))
        self.register_buffer("of_coarse", torch.zeros(pixels, coarse_channels))
        self.register_buffer("offset", torch.zeros(pixels, 1, 1))

    def calibrate(self, cells: Tensor) -> None:
        sizes = [self.of_y.shape[1], self.of_coarse.shape[1], 1]
        of_y, of_coarse, offset = (2 * math.pi * cells).split(sizes, dim=1)
        self.of_y.copy_(of_y)
        self.of_coarse.copy_(of_coarse)
        self.offset.copy_(offset[..., None])

    def forward(self, path: paths.Path, stack: Stack, coarse: Tensor | None) -> Stack:
        shrunk = path.alpha.clamp_min(0.1)  # what follows is 0 long before
        phase = stack.scale(1 / shrunk).linear(lambda x: mix(self.of_y, x), self.offset)
        if coarse is not None:
            phase = phase.shift(mix(self.of_coarse, coarse))
        seen = (-mix(self.of_y**2, (path.beta / shrunk) ** 2) / 2).exp()
        sin, cos = seen * phase.value.sin(), seen * phase.value.cos()
        return phase.map(sin, lambda: cos).cat(phase.map(cos, lambda: -sin))


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
    path: str = "straight",
    lattice: int = 0,
) -> Field:
    """A field by name: "residual" (all arguments), or "paper" (width of its three layers)."""
    if kind == "residual":
        return ResidualField(
            channels, coarse_channels, width, depth, scales, attention, path, lattice
        )
    if kind == "paper":
        return PaperField(channels, coarse_channels, (width,) * 3)
    raise UserError(f"unknown velocity field {kind!r}; choose one of {', '.join(FIELDS)}")
