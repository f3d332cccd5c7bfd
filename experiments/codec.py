"""What files of a trained model take, beside its own bound and classical formats.

    python experiments/codec.py experiments/models/cifar10 cifar10 --root DIR --steps 16 32 64

For each number of steps: bits/dim of the file, the model's bound on the same noise, the excess
without the images that a file begins with, and megabytes of pixels a second both ways; every file
is decoded and compared. Then PNG, WebP, JPEG-LS and JPEG XL, each image by itself and all in one
mosaic.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import mrcnf
from mrcnf import codec
from mrcnf.measure.classical import available, classical_sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of a trained model")
    parser.add_argument("data", help="test images, by name")
    parser.add_argument("--root", default="", help="where published files are")
    parser.add_argument("--limit", type=int, default=200, help="the first so many images; 0: all")
    parser.add_argument("--every", type=int, default=1, help="take every so manyth test image")
    parser.add_argument("--steps", type=int, nargs="*", default=[64], help="of the flows")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    model = mrcnf.load(options.run)
    images = mrcnf.data.load(options.data, "test", root=options.root).pixels[:: options.every]
    images = images[: options.limit or None]
    megabytes, rows = images.numel() / 1e6, list[dict[str, Any]]()
    for steps in options.steps:
        coded = codec.encode(model, images, steps=steps, verify=False)
        started = time.perf_counter()
        back = codec.decompress(model, coded.data)
        seconds = time.perf_counter() - started
        same = all(torch.equal(a, b) for a, b in zip(back, images, strict=True))
        rows.append({"steps": steps, "decoding_seconds": seconds, "same": same} | coded.table())
        # Of few images all may be of the beginning.
        excess = coded.excess_percent
        fine = "" if excess is None else f"{excess:+.2f}%"
        print(
            f"| {steps} steps, {len(coded.data):,} bytes | "
            f"{coded.bits_per_dim:.3f} | {coded.bound:.3f} | "
            f"{coded.overhead_percent:+.2f}% | {fine} | "
            f"{megabytes / coded.seconds:.4f} | {megabytes / seconds:.4f} | "
            f"{'' if same else 'NOT THE SAME IMAGES'}",
            flush=True,
        )
    names, missing = available()
    for size in classical_sizes(images, names):
        rows.append(vars(size))
        name = f"{size.name}, one mosaic" if size.mosaic else size.name
        print(
            f"| {name} | {size.bits_per_dim:.3f} | | | | "
            f"{size.encoding:.2f} | {size.decoding:.2f} |"
        )
    print(missing)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
