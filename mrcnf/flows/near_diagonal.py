"""What a velocity's Jacobian is near its diagonal, predicted by a small head on the network.

A codec wants to know by how much a short step stretches every coefficient, at every step, without
the tangents of a trace; and an estimated trace leaves less to chance where most of the Jacobian is
known (`trace.Known`). The features that the network computes its velocity from know it: two 1×1
convolutions find the diagonal of ∂f/∂y and the couplings of neighbouring positions, which make up
most of what is off the diagonal. They are fitted to products J·e (`training.calibrate`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(eq=False)
class Neighbours:
    """A symmetric matrix K of couplings between positions side by side."""

    right: Tensor
    """(N, C, C, H, W): of a position's channels, in rows, with those of the one to its right."""
    below: Tensor
    """(N, C, C, H, W): with those of the one below."""

    def apply(self, e: Tensor) -> Tensor:
        """K·e, shaped as e (N, C, H, W)."""
        right, below = F.pad(e, (0, 1))[..., 1:], F.pad(e, (0, 0, 0, 1))[..., 1:, :]
        found = (self.right * right[:, None]).sum(2) + (self.below * below[:, None]).sum(2)
        left = (self.right * e[:, :, None]).sum(1)
        above = (self.below * e[:, :, None]).sum(1)
        return found + F.pad(left, (1, 0))[..., :-1] + F.pad(above, (0, 0, 1, 0))[..., :-1, :]


class NearDiagonal(nn.Module):
    """Finds the Jacobian of a preconditioned velocity g·y + m·F near its diagonal.

    Args:
        width: channels of the network's last features.
        channels: of y.
        times: features of time.
        hidden: channels between the two convolutions.
    """

    def __init__(self, width: int, channels: int, times: int, hidden: int = 64) -> None:
        super().__init__()
        self.channels = channels
        pairs = channels * (channels - 1) // 2  # of the channels of one position
        out = channels + pairs + 2 * channels**2
        self.inner = nn.Conv2d(width + 2 * channels, hidden, 1)
        self.time = nn.Linear(times, hidden)
        self.outer = nn.Conv2d(hidden, out, 1)
        self.size = nn.Linear(times, out)
        for layer in (self.outer, self.size):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.outer.bias)  # type: ignore[arg-type]
        nn.init.ones_(self.size.bias)

    def forward(
        self, features: Tensor, gain: Tensor, log_spread: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor, Neighbours]:
        """The diagonal (N, C, H, W), the couplings of each position's channels, the neighbours.

        Args:
            features: (N, width, H, W).
            gain, log_spread: g and log q, shaped as y.
            time: (N or 1, times).
        """
        seen = torch.cat((features, 2 * gain, log_spread), 1)
        hidden = F.silu(self.inner(seen) + self.time(time)[:, :, None, None])
        out = self.outer(hidden) * self.size(time)[:, :, None, None]
        square = self.channels**2
        own, block, right, below = out.split(
            [self.channels, out.shape[1] - self.channels - 2 * square, square, square], 1
        )
        sides = (side.unflatten(1, (self.channels, self.channels)) for side in (right, below))
        return gain + own, block, Neighbours(*sides)

    def product(self, found: tuple[Tensor, Tensor, Neighbours], e: Tensor) -> Tensor:
        """What `forward` found, as a matrix, applied to e (N, C, H, W)."""
        diagonal, block, neighbours = found
        one, other = torch.triu_indices(self.channels, self.channels, 1, device=e.device)
        inside = torch.zeros_like(e).index_add(1, one, block * e[:, other])
        inside = inside.index_add(1, other, block * e[:, one])
        return diagonal * e + inside + neighbours.apply(e)
