"""The main job on embedded data: train, evaluate, sample, upscale, report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mrcnf import files, runtime, seeds
from mrcnf.data.datasets import Images
from mrcnf.data.imagefile import save_image
from mrcnf.data.reduce import average
from mrcnf.image.grid import grid
from mrcnf.measure import evaluate
from mrcnf.measure.classical import available, classical_sizes
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.report import plot
from mrcnf.runs import checkpoint, config
from mrcnf.runs.images import open_images
from mrcnf.training import levels as train

RECIPE = Path(__file__).with_name("demo.toml")


def run(out: Path, overrides: Sequence[str] = (), *, resume: bool = False) -> str:
    """Train the embedded recipe into `out`, write its figures and report.md; returns the report."""
    started = time.perf_counter()
    settings = config.load(RECIPE, overrides)
    train.train_levels(settings, settings.model.resolutions, out, resume=resume)
    model = checkpoint.load(out, runtime.choose_device(settings.train.device))
    test = open_images(settings.data, model.config, "test")
    result = evaluate.evaluate(model, test, **dataclasses.asdict(settings.evaluate))
    result.convergence = evaluate.convergence(model, test, limit=32, refinements=1)
    files.write(out / "evaluation.json", result.to_json() + "\n")
    _draw(model, test, out)
    used = test.pixels[: result.images]
    report = _report(result, used, time.perf_counter() - started)
    files.write(out / "report.md", report)
    return f"{report}\nwritten to {out}"


def _draw(model: MultiResolutionFlow, test: Images, out: Path) -> None:
    """The report's figures: samples, the busiest test images upscaled, the loss."""
    generator = seeds.generator(0, model.device)
    samples = model.sample(64, generator=generator)
    save_image(out / "samples.png", grid(samples, zoom=3))
    busiest = test.pixels.double().flatten(1).std(1).argsort(descending=True)[:6]
    truth, side = test.pixels[busiest], model.resolutions[0]
    inputs = average(truth, side, side)
    draws = torch.stack([model.upscale(inputs, generator=generator).cpu() for _ in range(4)])
    plot.upscaling_panel(out / "upscaling.png", inputs, draws, truth)
    plot.training_curves(out / "training.png", out)


def _digits(result: evaluate.Evaluation | evaluate.LevelReport) -> str:
    return f"{result.bpd:.3f} ± {result.bpd_stderr:.3f}"


def _report(result: evaluate.Evaluation, images: Tensor, seconds: float) -> str:
    formats, left_out = available()
    classical = classical_sizes(images, formats)
    step, side = result.convergence[-1], images.shape[-1]
    lines = [
        "# mrcnf demo",
        "",
        f"{result.images} images of {side}×{side}: {result.data}. The model's bits are an upper "
        f"bound on -log2 P per dimension; errors are over {result.error_over}.",
        "",
        "| | bits/dim |",
        "|---|---|",
        f"| **this model** | **{_digits(result)}** |",
        *[
            f"| {size.name}, {how} | {size.bits_per_dim:.3f} |"
            for mosaic, how in ((True, "all images in one mosaic"), (False, "one file per image"))
            for size in classical
            if size.mosaic == mosaic
        ],
        *(["", f"({left_out}.)"] if left_out else []),
        "",
        "| level | share of the bits/dim | NFE |",
        "|---|---|---|",
        *[f"| {part.resolution} | {_digits(part)} | {part.nfe:.0f} |" for part in result.levels],
        "",
        f"Solver {result.solver}; trace {result.trace}; {result.draws} noise draw. With "
        f"{step['solver']} the first {step['images']} images change by {step['difference']:+.4f} "
        f"± {step['difference_stderr']:.4f} bits/dim.",
        "",
        f"Everything took {seconds / 60:.1f} minutes.",
        "",
        "![samples](samples.png) ![upscaling](upscaling.png) ![training](training.png)",
        "",
    ]
    return "\n".join(lines)
