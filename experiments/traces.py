"""How much of one image's likelihood is the chance of its probes, by level and by trace.

    OMP_NUM_THREADS=1 python experiments/traces.py RUN DATA --root DIR --limit 8 --seeds 12

The same noise and solver under other probes: the standard deviation of log p, in nats, averaged
over images as variances are, and how many plain Hutchinson probes would have as small a one.
Seconds are of one core and one evaluation of all images. Calibrated traces need `mrcnf calibrate`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

import mrcnf
from mrcnf.image.noise import dequantise
from mrcnf.seeds import generator

TRACES = (
    ("hutchinson", 1), ("calibrated", 1), ("hutchinson", 4), ("calibrated", 4), ("hutch++", 2)
)  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of a trained model")
    parser.add_argument("data", help="as data.name; the test split is taken")
    parser.add_argument("--root", default="", help="as data.root")
    parser.add_argument("--limit", type=int, default=8, help="the first so many images")
    parser.add_argument("--seeds", type=int, default=12, help="of probes")
    parser.add_argument("--steps", type=int, default=0, help="of each level's solver; 0: its own")
    options = parser.parse_args()
    model = mrcnf.load(options.run)
    images = mrcnf.data.load(options.data, "test", root=options.root, limit=options.limit).pixels
    x, _ = dequantise(
        images, nbits=model.config.nbits, kind=model.config.pixel_noise, generator=generator(0)
    )
    print("| level | trace | nats | Hutchinson probes as good | seconds |\n|---|---|---|---|---|")
    for level in model:
        solver = replace(level.solver, steps=options.steps or level.solver.steps)
        plain = 0.0
        level.log_prob(x, solver=solver)  # the first time takes longer
        for method, probes in TRACES:
            trace, start = mrcnf.Trace(method, probes), time.perf_counter()
            found = torch.stack([
                level.log_prob(x, solver=solver, trace=trace, generator=generator(k)).log_prob
                for k in range(options.seeds)
            ])  # fmt: skip
            seconds = (time.perf_counter() - start) / options.seeds
            variance = found.double().var(0).mean().item()
            plain = plain or variance
            print(
                f"| {level.resolution} | {trace} | {variance**0.5:.1f} | {plain / variance:.1f} | "
                f"{seconds:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
