"""Which images of many are nearest to a given one: has a model learned them by heart?"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def nearest(images: Tensor, among: Tensor, k: int, *, chunk: int = 1000) -> Tensor:
    """For each image the k nearest of others, by Euclidean distance of the pixels.

    Args:
        images: uint8 (N, C, H, W).
        among: uint8 (M, C, H, W), M at least k.
        chunk: how many of `among` are compared at a time.

    Returns:
        int64 (N, k): indices into `among`, nearest first; of equally near ones the first.
    """
    wanted = images.flatten(1).double()
    distances = wanted.new_empty(len(images), 0)
    indices = torch.empty(len(images), 0, dtype=torch.int64, device=images.device)
    for first in range(0, len(among), chunk):
        # Up to the image's own norm; whole numbers, so double precision is exact.
        others = among[first : first + chunk].flatten(1).to(wanted)
        here = others.square().sum(1) - 2 * wanted @ others.T
        numbers = torch.arange(first, first + len(others), device=images.device)
        distances, order = torch.cat((distances, here), 1).sort(dim=1, stable=True)
        indices = torch.cat((indices, numbers.expand(len(images), -1)), 1).gather(1, order)[:, :k]
        distances = distances[:, :k]
    return indices
