"""A data source of one's own: a function that answers the images of a split."""

import torch
from torch import Tensor


def discs(split: str, resolution: int, *, count: int = 256) -> Tensor:
    """Grey discs on dark ground, uint8 (count, 1, resolution, resolution).

    Args:
        split: train or test, which must differ.
        resolution: of the model's finest level, in pixels; twice, four times … as large will do.
        count: how many: what `[data.options]` holds comes here.
    """
    generator = torch.Generator().manual_seed(["train", "test", "val"].index(split))
    x, y, radius = torch.rand(3, count, 1, 1, generator=generator)
    line = (torch.arange(resolution) + 0.5) / resolution
    distance = ((line - x) ** 2 + (line[:, None] - y) ** 2).sqrt()
    edge = ((0.1 + 0.3 * radius - distance) * resolution / 2).sigmoid()
    noise = torch.randn(edge.shape, generator=generator)
    return (40 + 160 * edge + 6 * noise).clamp(0, 255).to(torch.uint8)[:, None]
