"""The main job on embedded data: train, evaluate, sample, upscale, report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mrcnf import files, seeds
from mrcnf.data.imagefile import save_image
from mrcnf.data.reduce import average
from mrcnf.image.grid import grid
from mrcnf.report import page, plot
from mrcnf.report.subject import Limits, Subject, busiest
from mrcnf.runs import config
from mrcnf.training import levels as train

RECIPE = Path(__file__).with_name("demo.toml")


def run(out: Path, overrides: Sequence[str] = (), *, resume: bool = False) -> str:
    """Train the embedded recipe into `out`, write its figures and report.html.

    Returns:
        what it came to, in a few lines.
    """
    started = time.perf_counter()
    settings = config.load(RECIPE, overrides)
    limits = Limits(images=settings.evaluate.limit, device=settings.train.device)
    train.train_levels(settings, settings.model.resolutions, out, resume=resume)
    subject = Subject(out, limits=limits, progress=sys.stderr.isatty())
    result = subject.evaluation
    files.write(out / "evaluation.json", result.to_json() + "\n")
    _draw(subject)
    minutes = f"{(time.perf_counter() - started) / 60:.1f} min"
    command = shlex.join(["mrcnf", "demo", "--out", str(out), *overrides])
    target = out / "report.html"
    page.report(subject, target, command=command, facts=[("with all that is shown", minutes)])
    return f"{result}\n{target}: the report, to open in a browser"


def _draw(subject: Subject) -> None:
    """Figures as files: samples, the busiest test images upscaled, the loss."""
    model, out, test = subject.model, subject.run, subject.test.pixels
    generator = seeds.generator(0, model.device)
    save_image(out / "samples.png", grid(model.sample(64, generator=generator), zoom=3))
    truth, side = test[busiest(test, 6)], model.resolutions[0]
    inputs = average(truth, side, side)
    draws = torch.stack([model.upscale(inputs, generator=generator).cpu() for _ in range(4)])
    plot.upscaling_panel(out / "upscaling.png", inputs, draws, truth)
    plot.training_curves(out / "training.png", out)
