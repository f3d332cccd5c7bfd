"""How much lower the importance-weighted bound is, and how much of that is the trace's noise.

    python experiments/importance.py RUN DATA --root DIR --limit 200 --draws 16 --probes 8 16

K draws of noise give log P(image) ≥ E log (1/K) Σ exp(w_k), w_k being the one-draw bounds (Burda et
al. 2016, eq. 8). The trace is estimated from random probes, whose noise enters w: unbiased in the
mean of w, it makes the weighted bound look better than it is, by less the more probes there are.
So the bound is printed for several numbers of probes on the same noise, and for ever more draws.
"""

from __future__ import annotations

import argparse
import math

import torch
from tqdm import trange

import mrcnf
from mrcnf.image.bits import bits_per_dim
from mrcnf.measure.evaluate import bits_by_level, mean_and_error, set_solvers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of a trained model")
    parser.add_argument("data", help="as data.name; the test split is taken")
    parser.add_argument("--root", default="", help="as data.root")
    parser.add_argument("--limit", type=int, default=200, help="the first so many images")
    parser.add_argument("--draws", type=int, default=16, help="K, a power of two")
    parser.add_argument("--probes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--trace", default="hutchinson", help="hutchinson or calibrated")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--steps", type=int, default=0, help="of each level's solver; 0: its own")
    options = parser.parse_args()
    if options.draws.bit_count() != 1:
        parser.error(f"--draws {options.draws}: must be a power of two")
    model = mrcnf.load(options.run)
    if options.steps:
        set_solvers(model, {"solver": {"steps": options.steps}})
    images = mrcnf.data.load(options.data, "test", root=options.root, limit=options.limit).pixels
    dims = images[0].numel()
    for probes in options.probes:
        set_solvers(model, {"trace": {"method": options.trace, "probes": probes}})
        bits = torch.stack([
            bits_by_level(model, images, batch=options.batch, seed=k).sum(0)
            for k in trange(options.draws, desc=f"{probes} probes", unit="draw")
        ])  # fmt: skip
        weights = -bits * dims * math.log(2)
        print(f"{probes} probes: w has a standard deviation of {weights.std(0).mean():.1f} nats")
        for doublings in range(options.draws.bit_length()):
            groups = weights.unflatten(0, (-1, 2**doublings))
            bound = (groups.logsumexp(1) - math.log(groups.shape[1])).mean(0)
            each = bits_per_dim(bound, dims)
            mean, error = mean_and_error(each, None)
            less, less_error = mean_and_error(each - bits.mean(0), None)
            both = f"{mean:.4f} ± {error:.4f} | {less:+.4f} ± {less_error:.4f}"
            print(f"| {probes} | {groups.shape[1]} | {both} |", flush=True)


if __name__ == "__main__":
    main()
