"""`python -m benchmarks [--quick] --json FILE`: the table of this machine, printed and written."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import couplings, machine, scaling, solves, steps
from benchmarks.workload import Workload, paper_model

CODING = ("compress", "decompress")
WORKS = ("ml_step", "fm_step", "coupling_step", "evaluate", "sample", "scale", *CODING)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file to write the rows to")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and sizes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: both, where there")
    parser.add_argument("--work", default=",".join(WORKS), help="comma-separated subset")
    parser.add_argument("--batch", type=int, default=0, help="images; default 8, on CUDA 128")
    parser.add_argument("--repeats", type=int, default=0, help="rounds; default 7, quick 2")
    parser.add_argument("--train", type=int, default=-1, help="steps before; default 160, quick 40")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default PyTorch's")
    parser.add_argument("--plot", type=Path, help="write the figure of `scale` here")
    options = parser.parse_args(arguments)
    wanted = options.work.split(",")
    if unknown := sorted(set(wanted) - set(WORKS)):
        parser.error(f"--work {','.join(unknown)}: choose from {','.join(WORKS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device; leave --device out")
    if options.threads:
        torch.set_num_threads(options.threads)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows: list[dict[str, Any]] = []
    for device in [options.device] if options.device else devices:
        rows += measure(device, wanted, options)
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.plot and "scale" in wanted:
        scaling.plot([row for row in rows if row["device"] == rows[-1]["device"]], options.plot)
    print(f"wrote {options.json}")
    return 0


def measure(device: str, wanted: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one device; each is printed as soon as it is known."""
    quick = options.quick
    repeats = options.repeats or (2 if quick else 7)
    batch = options.batch or (8 if device == "cpu" else 128)
    training = options.train if options.train >= 0 else (40 if quick else 160)
    started = time.perf_counter()
    work = paper_model(device, batch, training)
    about = {"device": device, **environment(device), **work.about, "quick": quick}
    print(f"# {about}\n# {convolutions(work)}")
    print(f"{'work':14}{'ratio':>7} {'(min–max)':>13}{'ours':>10}{'reference':>11}{'MiB':>7}  what")
    makers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "ml_step": lambda: steps.ml_rows(work, repeats, quick),
        "fm_step": lambda: steps.fm_rows(work, repeats),
        "coupling_step": lambda: couplings.coupling_rows(device, batch, repeats),
        "evaluate": lambda: solves.evaluate_rows(work, repeats, quick),
        "sample": lambda: solves.sample_rows(work, repeats),
        "scale": lambda: scaling.scale_rows(device, 1 if quick else 3, quick),
    }
    if not set(CODING).isdisjoint(wanted):
        makers |= coders(device, batch, 1 if quick else 2, quick)
    rows: list[dict[str, Any]] = []
    for name in WORKS:
        if name in wanted:
            found = [{**row, **about} for row in makers[name]()]
            for row in found:
                show(row)
            rows += found
    print(f"# {device}: {time.perf_counter() - started:.0f} s in all", flush=True)
    return rows


def coders(
    device: str, batch: int, repeats: int, quick: bool
) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """The makers of rows of coding; where it is not possible they say why and make none."""
    try:
        from benchmarks import coding

        reason = coding.missing(device)
    except ImportError as error:  # a bare machine
        reason = str(error)
    if reason:
        print(f"# {', '.join(CODING)}: skipped: {reason}")
        return {name: list for name in CODING}
    bench = coding.Bench(batch, quick)
    return {name: partial(bench.rows, name, repeats) for name in CODING}


def environment(device: str) -> dict[str, object]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": name}


def convolutions(work: Workload) -> str:
    """Throughput of the finest level's hidden convolutions in the formats one may choose."""
    level = list(work.model)[-1]
    parts = []
    for name, memory_format, dtype in (
        ("float32 NCHW", torch.contiguous_format, torch.float32),
        ("float32 channels_last", torch.channels_last, torch.float32),
        ("bfloat16 channels_last", torch.channels_last, torch.bfloat16),
    ):
        run = machine.bare(level, 2 * work.batch, memory_format=memory_format, dtype=dtype)
        parts.append(f"{name} {machine.rate(run, work.device) / 1e9:.0f}")
    return "convolutions, forward and backward, GFLOP/s: " + ", ".join(parts)


def show(row: dict[str, Any]) -> None:
    extra = ""
    if "share_of_convolutions" in row:
        extra = f" · {row['share_of_convolutions']:.0%} of bare convolutions"
    if "megabytes_per_second" in row:
        extra += (
            f" · {row['megabytes_per_second']:.4f} MB/s"
            f" · {row['evaluations_per_pixel']:.0f} evaluations a pixel"
            f" (reference {row['reference_evaluations_per_pixel']:.0f})"
            f" · {row['bits_per_dim']:.3f} bits/dim"
            f" ({row['bits_over_reference']:+.3f} over the reference)"
        )
    spread = f"({row['ratio_min']:.1f}–{row['ratio_max']:.1f})"
    print(
        f"{row['work']:14}{row['ratio']:6.1f}× {spread:>13}{row['seconds']:9.4f}s"
        f"{row['reference_seconds']:10.4f}s{row['peak_bytes'] / 2**20:7.0f}  {row['name']}{extra}",
        flush=True,
    )
    for kind, reason in row.get("skipped", {}).items():
        print(f"#        skipped: {kind}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
