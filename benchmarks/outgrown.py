"""Training on images that outgrow memory: what it holds, and its pace beside images in memory.

    python -m benchmarks.outgrown --gigabytes 12 --json FILE

A file of so many gigabytes of 32×32 colour images is written a part at a time. Then levels are
trained for some steps on it, memory-mapped, and on its first part read into memory, in turn; and
both are gathered from alone. The file is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mrcnf import files, runtime
from mrcnf.data import datasets, packing
from mrcnf.data.datasets import Images
from mrcnf.data.streams import PART, Stream
from mrcnf.errors import UserError
from mrcnf.runs.config import Config, from_table
from mrcnf.training.batches import Batches
from mrcnf.training.order import EpochOrder
from mrcnf.training.trainer import Trainer

SHAPE = (3, 32, 32)
WARM = 3
"""Steps before any is timed."""


def anonymous() -> int:
    """Bytes of memory of this process that no file backs; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def generated(count: int) -> Stream:
    """Noisy gradients, the same ones for the same number."""
    size, (channels, height, width) = math.prod(SHAPE), SHAPE
    step = PART // size

    def parts(start: int) -> Iterator[np.ndarray]:
        ramp = np.linspace(0, 127, width).astype(np.uint8)
        for first in range(start, count, step):
            n = min(step, count - first)
            noise = np.frombuffer(np.random.default_rng(first).bytes(n * size), np.uint8)
            yield noise.reshape(n, *SHAPE) // 2 + ramp

    return Stream((count, channels, height, width), parts)


def write(out: Path, gigabytes: float) -> None:
    """Write the file, with a bar if somebody is watching."""
    stream = generated(int(gigabytes * 1e9) // math.prod(SHAPE))
    with tqdm(total=len(stream), desc=out.name, disable=not sys.stderr.isatty()) as bar:
        packing.pack(stream, out, name="generated", report=lambda done: bar.update(done - bar.n))


def recipe(device: str) -> Config:
    return from_table({
        "model": {"resolutions": [16, 32]}, "field": {"width": 16, "depth": 2},
        "train": {"batch": 64, "device": device},
    })  # fmt: skip


def pace(trainers: dict[str, Trainer], steps: int, laps: int) -> dict[str, list[float]]:
    """Images a second of each trainer, in laps that alternate between them."""
    found: dict[str, list[float]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        for _ in range(WARM):
            trainer.step()
    for _ in range(laps):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            for _ in range(steps):
                loss = trainer.step()["loss"]
            float(loss)  # waits for the device
            taken = time.perf_counter() - started
            found[name].append(steps * trainer.train.batch / taken)
    return found


def gathered(images: Images, steps: int, batch: int = 64) -> float:
    """Images a second that come from a source when nothing is computed with them."""
    batches = Batches(images, EpochOrder(len(images), batch, 1), 1, range(1), torch.device("cpu"))
    for step in range(WARM):
        list(batches.of_step(step))
    started = time.perf_counter()
    for step in range(WARM, WARM + steps):
        list(batches.of_step(step))
    return steps * batch / (time.perf_counter() - started)


def measure(
    folder: Path, gigabytes: float, steps: int, laps: int, device: str
) -> dict[str, Any]:
    """The numbers, of a file that is made in `folder`."""
    write(folder / "train.npy", gigabytes)
    written, before = (folder / "train.npy").stat().st_size, anonymous()
    mapped = datasets.load(f"npy:{folder}")
    config = recipe(device)
    trainer = Trainer(config, 32, mapped, folder / "mapped")
    for _ in range(WARM + steps):
        trainer.step()
    held = anonymous()
    started = time.perf_counter()
    for _ in mapped.stream().parts(0):  # so that it is in the system's cache, where it fits
        pass
    read = time.perf_counter() - started
    cached = gathered(mapped, 50 * steps)
    after = anonymous()
    few = mapped.first(min(len(mapped), int(0.5e9) // math.prod(SHAPE)))
    memory = Images(few.pixels.clone(), "memory", "train")
    beside = Trainer(config, 32, memory, folder / "memory")
    paces = pace({"mapped": trainer, "memory": beside}, steps, laps)
    ratios = [a / b for a, b in zip(paces["mapped"], paces["memory"], strict=True)]
    return {
        "bytes": written,
        "images": len(mapped),
        "device": str(trainer.device),
        "anonymous_before": before,
        "anonymous_training": held,
        "anonymous_most": max(held, after),
        "read_bytes_per_s": written / read,
        "images_per_s_mapped": statistics.median(paces["mapped"]),
        "images_per_s_memory": statistics.median(paces["memory"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "gathered_per_s_cached": cached,
        "gathered_per_s_memory": gathered(memory, 50 * steps),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outgrown", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=12.0, help="of the file")
    parser.add_argument("--folder", type=Path, help="where to make it; by default a temporary one")
    parser.add_argument("--steps", type=int, default=20, help="of a lap")
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    if not options.gigabytes > 0 or min(options.steps, options.laps) < 1:
        parser.error("--gigabytes, --steps and --laps must be positive")
    try:
        runtime.choose_device(options.device)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            row = measure(
                Path(folder), options.gigabytes, options.steps, options.laps, options.device
            )
    except UserError as error:
        parser.error(str(error))
    print(
        f"{row['bytes'] / 1e9:.2f} GB, {row['images']} images, on {row['device']}\n"
        f"anonymous memory: {row['anonymous_most'] / 1e9:.2f} GB when training from the file, "
        f"{row['anonymous_before'] / 1e9:.2f} GB before\n"
        f"training: {row['images_per_s_mapped']:.0f} images/s from the file, "
        f"{row['images_per_s_memory']:.0f} from memory, ratio {row['ratio']:.3f} "
        f"({row['ratio_min']:.3f} to {row['ratio_max']:.3f})\n"
        f"gathering alone: {row['gathered_per_s_cached']:.0f} images/s from the file, "
        f"{row['gathered_per_s_memory']:.0f} from memory"
    )
    if options.json:
        files.write(options.json, json.dumps(row, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
