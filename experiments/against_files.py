"""A model's bits beside those of classical formats, image by image on the same test images.

    python experiments/against_files.py RUN DATA [--every 7] [--formats "JPEG XL, effort 9"]

The bound of `mrcnf evaluate` (one draw), files with their headers, and the paired differences;
errors are over photographs where the data say which image is of which, else over images. What
files take is kept in --sizes FILE.npz, for the next model of the same images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mrcnf
from mrcnf.image.grid import grid
from mrcnf.measure.classical import available, bits_of_files
from mrcnf.measure.evaluate import mean_and_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of a trained model")
    parser.add_argument("data", help="as data.name; the test split is taken")
    parser.add_argument("--root", default="", help="as data.root")
    parser.add_argument("--every", type=int, default=1, help="take every so manyth image")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=0.0, help="as evaluate.tolerance")
    parser.add_argument("--sizes", type=Path, help="file of formats' bits, read and written")
    parser.add_argument("--formats", nargs="*", default=available()[0])
    options = parser.parse_args()
    images = mrcnf.data.load(options.data, "test", root=options.root)
    groups = None if images.groups is None else images.groups[:: options.every]
    pixels = images.pixels[:: options.every]
    images = mrcnf.data.Images(pixels, images.name, images.split, groups)
    files = _bits_of_files(images, options.formats, options.sizes)
    model = mrcnf.load(options.run)
    found = mrcnf.evaluate(
        model, images, batch=options.batch, tolerance=options.tolerance, progress=True
    )
    print(found)
    ours = found.bits.sum(0)
    print("| | bits/dim | all in one file | the model less it |\n|---|---|---|---|")
    for name, (theirs, whole) in files.items():
        mean, error = mean_and_error(theirs, images.groups)
        less, less_error = mean_and_error(ours - theirs, images.groups)
        print(
            f"| {name} | {mean:.3f} ± {error:.3f} | {whole:.3f} | {less:+.3f} ± {less_error:.3f}, "
            f"{less / mean:+.1%} |"
        )


def _bits_of_files(
    images: mrcnf.data.Images, formats: Sequence[str], kept: Path | None
) -> dict[str, tuple[Tensor, float]]:
    """Bits per dimension of a file for each image, and of one for all of them, by format."""
    known: dict[str, Any] = {"images": np.array(images.sha256)}
    if kept is not None and kept.exists():
        with np.load(kept) as archive:
            if str(archive["images"]) != images.sha256:
                raise SystemExit(f"{kept} is of other images; remove it, or name another file")
            known |= dict(archive)
    pixels = images.pixels
    mosaic = grid(pixels, gap=0)[None]
    for name in formats:
        if name not in known:
            each = bits_of_files(pixels, name, progress=True)
            # The mosaic may have empty places, which its pixels do not count.
            whole = bits_of_files(mosaic, name) * mosaic.numel() / pixels.numel()
            known[name] = torch.cat((whole, each)).numpy()
            if kept is not None:
                np.savez(kept, **known)
    found = {name: torch.from_numpy(known[name]) for name in formats}
    return {name: (bits[1:], float(bits[0])) for name, bits in found.items()}


if __name__ == "__main__":
    main()
