"""Seeds, and the order of the images, as functions of the step: nothing to save for a resume."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


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
            generator = torch.Generator().manual_seed(seed_of(self.seed, 0, f"epoch {epoch}"))
            self.epoch, self.order = epoch, torch.randperm(self.n, generator=generator)
        part = self.order[offset : offset + count]
        if len(part) < count:
            part = torch.cat((part, self._slice(position + len(part), count - len(part))))
        return part


def seed_of(seed: int, resolution: int, what: str) -> int:
    """A seed for one purpose: 63 bits of a hash of the run's seed, the level and the purpose."""
    digest = hashlib.blake2b(f"{seed}/{resolution}/{what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
