"""Space to depth and back: the same numbers on half the height and width."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mrcnf.flows.base import Lift


def squeeze(y: Tensor) -> Tensor:
    """(N, C, H, W) → (N, 4C, H/2, W/2): all channels of the top left pixels of 2×2, then of the
    top right ones, the bottom left and the bottom right ones.

    >>> import torch
    >>> squeeze(torch.arange(8.0).reshape(1, 1, 2, 4)).flatten(2).tolist()
    [[[0.0, 2.0], [1.0, 3.0], [4.0, 6.0], [5.0, 7.0]]]
    """
    n, c, h, w = y.shape
    patches = y.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return patches.reshape(n, 4 * c, h // 2, w // 2)


def unsqueeze(z: Tensor) -> Tensor:
    """The inverse of `squeeze`: (N, 4C, H, W) → (N, C, 2H, 2W)."""
    n, c, h, w = z.shape
    patches = z.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
    return patches.reshape(n, c // 4, 2 * h, 2 * w)


class Squeeze(Lift):
    """`squeeze` as a step."""

    shrink = 2.0

    def lift(self, y: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return squeeze(y)

    def drop(self, z: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return unsqueeze(z)


class Unsqueeze(Lift):
    """`unsqueeze` as a step."""

    shrink = 0.5

    def lift(self, y: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return unsqueeze(y)

    def drop(self, z: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return squeeze(z)
