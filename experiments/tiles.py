"""Whole images, or tiles of the size that a model was trained on: which takes fewer bits?

    python experiments/tiles.py experiments/models/cifar10 npz:DIR/photos128 --every 28

The same noise either way; the levels' shares of the bits per dimension, and their paired
differences with standard errors over images.
"""

from __future__ import annotations

import argparse
import math

import torch

import mrcnf
from mrcnf.image.bits import bits_per_dim
from mrcnf.image.noise import dequantise
from mrcnf.model.level import likelihoods
from mrcnf.seeds import generator


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of a trained model")
    parser.add_argument("data", help="images larger than the model's, by multiples of its size")
    parser.add_argument("--every", type=int, default=1, help="take every so manyth test image")
    options = parser.parse_args()
    model = mrcnf.load(options.run)
    side = model.config.finest
    images = mrcnf.data.load(options.data, "test").pixels[:: options.every]
    bits: dict[int, list[torch.Tensor]] = {r: [] for r in model.resolutions}
    for i, batch in enumerate(images.split(4)):
        x, log_q = dequantise(batch, generator=generator(i))
        rows = x.unfold(2, side, side).unfold(3, side, side)  # (N, C, rows, columns, side, side)
        tiles = rows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        count = len(tiles) // len(x)
        shares = log_q.repeat_interleave(count) / count
        whole = likelihoods(model, x, log_q, generator=generator(i))
        cut = likelihoods(model, tiles, shares, generator=generator(i))
        for resolution in model.resolutions:
            pieces = cut[resolution].log_prob.reshape(len(x), count).sum(1)
            both = torch.stack((whole[resolution].log_prob, pieces))
            bits[resolution].append(bits_per_dim(both, x[0].numel()).double())
    print(f"{len(images)} images of {x.shape[2]}×{x.shape[3]}, tiles of {side}×{side}")
    for resolution, parts in bits.items():
        whole_bits, tile_bits = torch.cat(parts, 1)
        difference = tile_bits - whole_bits
        error = difference.std() / math.sqrt(len(images))
        print(
            f"level {resolution}: whole {whole_bits.mean():.4f}, tiles {tile_bits.mean():.4f}, "
            f"tiles - whole {difference.mean():+.4f} ± {error:.4f}"
        )


if __name__ == "__main__":
    main()
