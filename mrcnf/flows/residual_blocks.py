"""Residual blocks of convolutions, which velocities and conditioners of couplings share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrcnf.flows.tangents import Conv, Dual, normalise


class ResidualBlocks(nn.Module):
    """A first convolution, residual blocks, and a last convolution that starts at zero.

    With several scales the blocks form a U: `depth` of them at each scale on the way down and
    again on the way up, at each scale twice as wide on half the side.

    Args:
        inputs, outputs: channels.
        width: channels of the hidden layers at the full scale.
        depth: number of residual blocks, of two 3×3 convolutions each (at every scale, see above).
        scales: 1 works at full scale throughout.
        attention: self-attention over positions after each block of the smallest scale.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        depth: int,
        scales: int = 1,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.smallest = width, scales - 1
        self.tied_to_size = attention
        way_down = [scale for scale in range(self.smallest) for _ in range(depth)]
        self.plan = [*way_down, *[self.smallest] * depth, *reversed(way_down)]
        self.widths = [width * 2**scale for scale in self.plan]
        self.first = Conv(inputs, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(w) for w in self.widths)
        sizes = list(pairwise(width * 2**scale for scale in range(scales)))
        self.down = nn.ModuleList(Conv(fine, small, 2, stride=2) for fine, small in sizes)
        self.up = nn.ModuleList(Conv(small, fine, 1) for fine, small in sizes)
        self.attention = nn.ModuleList(
            _Attention(width * 2**self.smallest) for _ in range(depth if attention else 0)
        )
        self.last = Conv(width, outputs, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def hidden_weights(self) -> list[nn.Parameter]:
        """The convolution weights between hidden layers, which Muon may train."""
        between = (self.blocks, self.down, self.up, self.attention)
        return [p for part in between for p in part.parameters() if p.dim() == 4]

    def through(
        self,
        hidden: Dual,
        maps: Sequence[Tensor] = (),
        scales: Sequence[Tensor] = (),
        shifts: Sequence[Tensor] = (),
    ) -> Dual:
        """The blocks, with what the coarse image (`maps`) and time tell each of them.

        Args:
            hidden: what the first convolution made, of `width` channels.
            maps: (N, width of the block, H, W) for each block, at the full scale, to be added
                inside it.
            scales, shifts: (N, width of the block, 1, 1) for each block: what the inside of the
                block is multiplied by, less 1, and what is added.
        """
        attention, skipped, now = iter(self.attention), [], 0
        for i, block in enumerate(self.blocks):
            if self.plan[i] > now:
                skipped.append(hidden)
                hidden = self.down[now](hidden)
            elif self.plan[i] < now:
                wide = self.up[now - 1](hidden)
                hidden = wide.linear(lambda x: F.interpolate(x, scale_factor=2)) + skipped.pop()
            now = self.plan[i]
            shift = shifts[i] if shifts else None
            if maps:
                own = maps[i].to(hidden.value.dtype if shift is None else shift.dtype)
                own = F.avg_pool2d(own, 2**now) if now else own
                shift = own if shift is None else shift + own
            hidden = block(hidden, 1 + scales[i] if scales else None, shift)
            if now == self.smallest and self.attention:
                hidden = next(attention)(hidden)
        return hidden


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Conv(width, width, 3, padding=1)
        self.outer = Conv(width, width, 3, padding=1)
        with torch.no_grad():
            self.outer.weight *= 0.3

    def forward(self, hidden: Dual, scale: Tensor | None, shift: Tensor | None) -> Dual:
        inner = self.inner(normalise(hidden).silu())
        inner = inner if scale is None else inner.scale(scale)
        inner = inner if shift is None else inner.shift(shift)
        return hidden + self.outer(inner.silu())


class _Attention(nn.Module):
    """Self-attention over all positions, added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
        self.inner = Conv(width, 3 * width, 1)
        self.outer = Conv(width, width, 1)
        with torch.no_grad():
            self.outer.weight *= 0.3

    def forward(self, hidden: Dual) -> Dual:
        side = hidden.value.shape[-2:]
        inner = self.inner(normalise(hidden))
        value, tangents = inner.value, inner.tangents
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
        return hidden + self.outer(Dual(self._join(weights @ v, side), pushed))

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(…, 3·C, H, W) → queries, keys and values, (…, heads, H·W, C/heads) each."""
        return x.flatten(-2).unflatten(-2, (3, self.heads, -1)).mT.unbind(-4)

    def _join(self, x: Tensor, side: torch.Size) -> Tensor:
        return x.mT.flatten(-3, -2).unflatten(-1, side)


def coarse_network(coarse_channels: int, width: int, outputs: int) -> nn.Sequential:
    """From a coarse image to what it tells each block."""
    return nn.Sequential(
        nn.Conv2d(coarse_channels, width, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(width, outputs, 1),
    )


def hidden_weights(network: nn.Sequential | None) -> list[nn.Parameter]:
    """As `ResidualBlocks.hidden_weights`, of a `coarse_network`."""
    return [] if network is None else [network[2].weight, network[4].weight]  # type: ignore[list-item]
