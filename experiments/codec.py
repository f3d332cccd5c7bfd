"""What files of a trained model take, beside its own bound and classical formats.

    python experiments/codec.py experiments/models/cifar10 cifar10 --root DIR --steps 16 32 64
    python experiments/codec.py experiments/models/cifar10 photo.png --sides 64 128 256

For each number of steps: bits/dim of the file, the model's bound on the same noise, the excess
without what a file begins with, and megabytes of pixels a second both ways; every file is decoded
and compared. Then PNG, WebP, JPEG-LS and JPEG XL, each image by itself and all in one mosaic. Of an
image file, squares from its middle can be taken. codec.sh runs it for the README.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mrcnf
from mrcnf import codec
from mrcnf.data.imagefile import read_image
from mrcnf.measure.classical import available, classical_sizes
from mrcnf.model.model import MultiResolutionFlow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of a trained model")
    parser.add_argument("data", help="test images, by name, or an image file")
    parser.add_argument("--root", default="", help="where published files are")
    parser.add_argument("--limit", type=int, default=200, help="the first so many images; 0: all")
    parser.add_argument("--every", type=int, default=1, help="take every so manyth test image")
    parser.add_argument("--sides", type=int, nargs="*", help="of squares from an image's middle")
    parser.add_argument("--steps", type=int, nargs="*", default=[64], help="of the flows")
    parser.add_argument("--portable", action="store_true", help="code with exact arithmetic")
    parser.add_argument("--alone", action="store_true", help="a file for each image")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    model, rows = mrcnf.load(options.run), list[dict[str, Any]]()
    for images in _files(options):
        for steps in options.steps:
            rows.append(_coded(model, images, steps, options.portable))
        names, missing = available()
        for size in classical_sizes(images, names):
            rows.append(vars(size) | _about(images))
            name = f"{size.name}, one mosaic" if size.mosaic else size.name
            print(
                f"| {name} | {size.bits_per_dim:.3f} | | | | "
                f"{size.encoding:.2f} | {size.decoding:.2f} |",
                flush=True,
            )
        print(missing)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


def _files(options: argparse.Namespace) -> list[Tensor]:
    """The images of each file, uint8 (N, C, H, W)."""
    path = Path(options.data)
    if path.is_file():
        image = read_image(path)
        sides = options.sides or [0]
        return [_middle(image, side)[None] for side in sides]
    images = mrcnf.data.load(options.data, "test", root=options.root).pixels[:: options.every]
    images = images[: options.limit or None]
    return list(images[:, None]) if options.alone else [images]


def _middle(image: Tensor, side: int) -> Tensor:
    _, height, width = image.shape
    if not side:
        return image
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]


def _about(images: Tensor) -> dict[str, Any]:
    return {"count": len(images), "height": images.shape[2], "width": images.shape[3]}


def _coded(
    model: MultiResolutionFlow, images: Tensor, steps: int, portable: bool
) -> dict[str, Any]:
    """One file: written, read, compared, and printed as a line."""
    started = time.perf_counter()
    coded = codec.encode(model, images, steps=steps, verify=False, portable=portable)
    writing = time.perf_counter() - started - coded.bound_seconds
    started = time.perf_counter()
    back = codec.decompress(model, coded.data)
    reading = time.perf_counter() - started
    same = all(torch.equal(a, b) for a, b in zip(back, images, strict=True))
    # Of few images all may be of the beginning.
    fine = "" if coded.excess_percent is None else f"{coded.excess_percent:+.2f}%"
    megabytes = images.numel() / 1e6
    print(
        f"| {len(images)} of {images.shape[3]}×{images.shape[2]}, {steps} steps, "
        f"{len(coded.data):,} bytes | {coded.bits_per_dim:.3f} | {coded.bound:.3f} | "
        f"{coded.overhead_percent:+.2f}% | {fine} | "
        f"{megabytes / writing:.4f} | {megabytes / reading:.4f} | "
        f"{'' if same else 'NOT THE SAME IMAGES'}",
        flush=True,
    )
    numbers = {"steps": steps, "same": same, "writing": writing, "reading": reading}
    return numbers | _about(images) | coded.table()


if __name__ == "__main__":
    main()
