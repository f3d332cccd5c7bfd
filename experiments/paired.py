"""Bits of several runs on the same images and noise, and how far each is from the first run's.

    python experiments/paired.py RUN RUN... --data cifar10 --root DIR --tolerance 0.0005

Images differ far more than models do, so a difference is taken image by image; its standard error
is over images.
"""

from __future__ import annotations

import argparse
import math

import torch

import mrcnf
from mrcnf.measure.evaluate import mean_and_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders of trained models")
    parser.add_argument("--data", default="cifar10", help="as data.name; the test split is taken")
    parser.add_argument("--root", default="", help="as data.root")
    parser.add_argument("--limit", type=int, default=1000, help="the first so many images")
    parser.add_argument("--few", type=int, default=128, help="also for the first so many of them")
    parser.add_argument("--tolerance", type=float, default=0.0, help="as evaluate.tolerance")
    options = parser.parse_args()
    images = mrcnf.data.load(options.data, "test", root=options.root, limit=options.limit)
    first: tuple[torch.Tensor, float] | None = None
    print("| run | images | bits/dim | less the first run's |\n|---|---|---|---|")
    for run in options.runs:
        found = mrcnf.evaluate(mrcnf.load(run), images, tolerance=options.tolerance)
        bits, own = found.bits.sum(0), (found.corrected or {}).get("bpd_stderr", 0.0)
        first = (bits, own) if first is None else first
        for count in sorted({min(options.few, len(images)), len(images)}):
            groups = None if images.groups is None else images.groups[:count]
            mean, error = mean_and_error(bits[:count], groups)
            less, apart = mean_and_error((bits - first[0])[:count], groups)
            difference = f"{less:+.4f} ± {math.hypot(apart, own, first[1]):.4f}"
            print(
                f"| {run} | {count} | {mean:.4f} ± {math.hypot(error, own):.4f} | "
                f"{'' if first[0] is bits else difference} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
