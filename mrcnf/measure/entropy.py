"""Which entropy leaves a split flow, and which stays, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mrcnf import seeds
from mrcnf.errors import UserError
from mrcnf.flows.multiscale import MultiscaleFlow, Split
from mrcnf.flows.shuffle import entropy
from mrcnf.image.noise import check_images, dequantise
from mrcnf.model.level import Level

NORMAL = 0.5 * math.log(2 * math.pi * math.e)
"""Differential entropy of a standard normal number, in nats."""


@dataclass
class SplitEntropy:
    """One split of one level. Entropies are of one number, in nats, in the flow's units."""

    resolution: int
    split: int
    """The first is 1, nearest to the data."""
    leaves: list[float]
    """Differential entropy of each channel that leaves, over images and positions."""
    stays: list[float]
    """The same of each channel that stays."""
    leaves_under_model: list[float]
    """What the model's prior pays for each channel that leaves: its cross-entropy, which is no
    less than the entropy, and equal where the prior fits."""
    stays_under_model: float
    """What the scales that follow pay for what stays, mean over channels."""

    def __str__(self) -> str:
        leaves, stays = _mean(self.leaves), _mean(self.stays)
        return (
            f"level {self.resolution}, split {self.split}: {len(self.leaves)} channels leave with "
            f"{leaves:.4f} nats a number ({_mean(self.leaves_under_model):.4f} under their "
            f"prior), {len(self.stays)} stay with {stays:.4f} ({self.stays_under_model:.4f} under "
            f"the rest of the flow)"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def splitting(levels: Iterable[Level]) -> list[Level]:
    """Those of the levels whose flow splits.

    Raises:
        UserError: none does.
    """
    split = [level for level in levels if isinstance(level.flow, MultiscaleFlow)]
    if not split:
        raise UserError(
            "no level of this run has a split flow, which entropies could be of; train one with "
            "flow.splits = 1 or more"
        )
    return split


@torch.no_grad()
def entropies(
    levels: Iterable[Level],
    images: Tensor,
    *,
    batch: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> list[SplitEntropy]:
    """The entropies at every split of every level that splits.

    Args:
        images: uint8 (N, C, H, W) at the model's finest resolution.
        batch: images at once.
        seed: of noise and probes.
        progress: show a bar on stderr.

    Raises:
        UserError: no level splits, or the images are not such as the model is of.
    """
    split, found = splitting(levels), []
    check_images(images, split[0].model.channels)
    for level in split:
        batches = tqdm(images.split(batch), desc=f"level {level.resolution}", unit="batch",
                       disable=not progress)  # fmt: skip
        parts = [_of_batch(level, chunk, seed, b) for b, chunk in enumerate(batches)]
        for i, splits in enumerate(zip(*parts, strict=True)):
            found.append(_report(level.resolution, i + 1, list(splits)))
    return found


def _of_batch(level: Level, images: Tensor, seed: int, number: int) -> list[Split]:
    assert isinstance(level.flow, MultiscaleFlow)
    generator, model = seeds.generator(seeds.of_batch(seed, number), level.device), level.model
    x, _ = dequantise(
        images.to(level.device), nbits=model.nbits, kind=model.pixel_noise, generator=generator
    )
    y, condition, _ = level.prepare(x)
    return level.flow.split(
        y, condition, solver=level.solver, trace=level.trace, generator=generator
    )


def _report(resolution: int, number: int, parts: list[Split]) -> SplitEntropy:
    stays = torch.cat([part.stays for part in parts])
    leaves = torch.cat([part.leaves for part in parts])
    log_std = torch.cat([part.log_std for part in parts])
    noise = torch.cat([part.noise for part in parts])
    paid = (0.5 * noise.square() + log_std).mean((0, 2, 3)) + 0.5 * math.log(2 * math.pi)
    rest = torch.cat([part.log_prob for part in parts if part.log_prob is not None])
    return SplitEntropy(
        resolution,
        number,
        entropy(leaves).tolist(),
        entropy(stays).tolist(),
        paid.tolist(),
        float(-rest.mean() / stays[0].numel()),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
