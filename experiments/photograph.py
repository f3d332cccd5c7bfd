"""A photograph of any size through a model: bits, a sample as large, the photograph enlarged.

    python experiments/photograph.py experiments/models/cifar10 photo.jpg [--level 16]

Prints seconds, and the largest memory of the process so far.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import mrcnf
from mrcnf.data.imagefile import read_image
from mrcnf.seeds import generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of a trained model")
    parser.add_argument("photograph", type=Path)
    parser.add_argument("--level", type=int, help="enlarge from this scale")
    options = parser.parse_args()
    model = mrcnf.load(options.run)
    image = read_image(options.photograph, channels=model.config.channels)[None]
    level = options.level or model.resolutions[-2]
    fitting = [side // model.multiple * model.multiple for side in image.shape[2:]]
    whole = image[..., : fitting[0], : fitting[1]]
    size = (fitting[0], fitting[1])
    for name, work in (
        (f"bits_per_dim, {size}", lambda: model.bits_per_dim(whole, generator=generator(0))),
        (
            f"bits_per_dim, {tuple(image.shape[2:])}, pad=True",
            lambda: model.bits_per_dim(image, pad=True, generator=generator(0)),
        ),
        (f"sample, {size}", lambda: model.sample(1, size=size, generator=generator(0))),
        (f"upscale, level={level}", lambda: model.upscale(image, level, generator=generator(0))),
    ):
        started = time.perf_counter()
        answer = work()
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found = f"{answer.item():.3f}" if answer.dim() == 1 else tuple(answer.shape)
        print(f"{name}: {found}, {seconds:.0f} s, peak {peak:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
