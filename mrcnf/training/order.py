"""The order of the images, as a function of the step: nothing to save for a resume."""

from __future__ import annotations

import torch
from torch import Tensor

from mrcnf import seeds


class EpochOrder:
    """Which images each step takes: every epoch is a fresh permutation of all of them.

    Args:
        n: images.
        batch: images per step.
        seed: of the permutations, which all levels share.
    """

    def __init__(self, n: int, batch: int, seed: int) -> None:
        self.n, self.batch, self.seed = n, batch, seed
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def indices(self, step: int) -> Tensor:
        """The images of a step, (batch,)."""
        first, whole = step * self.batch, min(self.n, self.batch)
        starts = range(first, first + self.batch, max(1, whole))
        return torch.cat([self._slice(start, whole) for start in starts])[: self.batch]

    def _slice(self, position: int, count: int) -> Tensor:
        epoch, offset = divmod(position, self.n)
        if epoch != self.epoch:
            generator = seeds.generator(seeds.seed_of(self.seed, 0, f"epoch {epoch}"))
            self.epoch, self.order = epoch, torch.randperm(self.n, generator=generator)
        part = self.order[offset : offset + count]
        if len(part) < count:
            part = torch.cat((part, self._slice(position + len(part), count - len(part))))
        return part
