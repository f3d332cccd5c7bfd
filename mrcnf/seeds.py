"""Where every random number comes from: one seed per run, and a seed of its own per use.

| drawn | seed |
|---|---|
| a level's first weights, the images that its units are fitted to | `seed_of(S, R, "weights")` |
| images for the units of a level that starts from another one | `seed_of(S, R, "units")` |
| the order of the images in an epoch, one for all levels | `seed_of(S, 0, "epoch E")` |
| a step's mirroring, crops, noise, times, probes, by micro-batch | `seed_of(S, R, "STEP/PIECE")` |
| the images that a step measures an order on | `seed_of(S, R, "STEP/order")` |
| what training draws as it goes, and the images it is drawn upon | `seed_of(S, R, "samples")` |
| the images, times and signs that a codec's heads are fitted to | `seed_of(S, R, "calibration")` |
| an evaluation's noise and probes, by batch and draw | `of_batch(S, batch, draw)` |
| an attack's start, noise and probes, by restart and batch | `seed_of(S, 0, "attack ε/K/B")` |
| the noise and probes to compare its ends on | `of_batch(seed_of(S, 0, "ends"), …)` |
| random signs to compare an attack with | `seed_of(S, 0, "signs ε")` |
| the images that a model is tried on that are drawn, not read; resamples of an interval | S |
| samples, upscaled images | S itself |
| probes of a flow's short steps | S + the number of the step |

with S the seed that the user gave and R the level's resolution. No seed depends on what was
drawn before, so a resumed run, and a run on several processes, continue as an undisturbed one.
"""

from __future__ import annotations

import hashlib

import torch

from mrcnf.errors import UserError


def seed_of(seed: int, resolution: int, what: str) -> int:
    """A seed for one purpose in training, 63 bits of a hash.

    Args:
        seed: of the run, `train.seed`.
        resolution: of the level; 0 for what all levels share.
        what: the purpose, in the words of the table above.
    """
    digest = hashlib.blake2b(f"{seed}/{resolution}/{what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def of_batch(seed: int, batch: int, draw: int = 0) -> int:
    """The seed of one batch of an evaluation and one draw of its noise.

    Published numbers rest on this formula. Nothing repeats below 1009 draws of 991 batches, and
    it does not matter which process takes a batch.
    """
    return seed * 1_000_003 + batch * 1009 + draw


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on a device, at the beginning of a seed's numbers.

    Raises:
        UserError: the seed does not fit into 64 bits.

    >>> torch.rand(2, generator=generator(0)).equal(torch.rand(2, generator=generator(0)))
    True
    """
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"seed {seed} does not fit into 64 bits; choose a smaller one")
    return torch.Generator(device).manual_seed(seed)
