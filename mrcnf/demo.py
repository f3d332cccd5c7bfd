"""The main job on embedded data: train, evaluate, sample, upscale, report."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mrcnf import files, runtime
from mrcnf.data.imagefile import read_image, save_image
from mrcnf.errors import UserError
from mrcnf.measure import evaluate
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.report import plot
from mrcnf.runs import checkpoint, config
from mrcnf.training import trainer as train

RECIPE = Path(__file__).with_name("demo.toml")


def run(out: Path, overrides: Sequence[str] = (), *, resume: bool = False) -> str:
    """Train the embedded recipe into `out`, write its figures and report.md; returns the report."""
    started = time.perf_counter()
    settings = config.load(RECIPE, overrides)
    train.train_levels(settings, settings.model.resolutions, out, resume=resume)
    model = checkpoint.load(out, runtime.choose_device(settings.train.device))
    test = train.load_images(settings.data, model.config, "test")
    result = evaluate.evaluate(
        model,
        test,
        limit=settings.evaluate.limit,
        batch=settings.evaluate.batch,
        draws=settings.evaluate.draws,
        seed=settings.evaluate.seed,
    )
    result.convergence = evaluate.convergence(model, test, limit=32, refinements=1)
    files.write(out / "evaluation.json", result.to_json() + "\n")
    generator = torch.Generator(model.device).manual_seed(0)
    samples = model.sample(64, generator=generator)
    save_image(out / "samples.png", plot.grid(samples, zoom=3))
    busiest = test.pixels.double().flatten(1).std(1).argsort(descending=True)[:6]
    truth = test.pixels[busiest]
    inputs = _reduced(truth, model.resolutions[0])
    draws = torch.stack([model.upscale(inputs, generator=generator).cpu() for _ in range(4)])
    plot.upscaling_panel(out / "upscaling.png", inputs, draws, truth)
    plot.training_curves(out / "training.png", out)
    used = test.pixels[: result.images]
    report = _report(result, used, time.perf_counter() - started)
    files.write(out / "report.md", report)
    return f"{report}\nwritten to {out}"


def classical_bits(images: Tensor, form: str, *, mosaic: bool) -> float:
    """Bits per dimension of a lossless image file: PNG or WEBP, of each image or of one mosaic."""
    pictures = [plot.grid(images, gap=0)] if mosaic else list(images)
    total = 0
    for image in pictures:
        array = image.permute(1, 2, 0).squeeze(2).numpy()
        buffer = io.BytesIO()
        options = {"lossless": True, "quality": 100, "method": 6} if form == "WEBP" else {}
        Image.fromarray(array).save(buffer, form, optimize=True, **options)
        total += 8 * buffer.tell()
    return total / images.numel()


def upscale_file(
    model: MultiResolutionFlow,
    path: Path,
    out: Path,
    *,
    level: int = 0,
    draws: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Upscale one image file into PNGs in `out`; yields a line about each thing done."""
    if draws < 1:
        raise UserError(f"draws must be at least 1, got {draws}")
    image = read_image(path, channels=model.config.channels)[None]
    side, finest = image.shape[-1], model.config.finest
    if image.shape[2] != side:
        raise UserError(f"{path} is {side}×{image.shape[2]}: crop it to a square first")
    target = level or max((r for r in model.resolutions if r <= min(side, finest // 2)), default=0)
    if target not in model.resolutions or target > side or side % target:
        raise UserError(
            f"{path} is {side}×{side}: it can be reduced to none of the levels "
            f"{list(model.resolutions)}" + (f", nor to level {level}" if level else "")
        )
    truth = None
    if side != target:
        yield f"{path}: reduced from {side}×{side} to level {target}×{target}"
        if side >= finest and side % finest == 0:
            truth = _reduced(image, finest)
        image = _reduced(image, target)
    generator = torch.Generator(model.device).manual_seed(seed)
    results = torch.stack(
        [
            model.upscale(image.to(model.device), temperature=temperature, generator=generator)
            for _ in range(draws)
        ]
    ).cpu()
    for k, result in enumerate(results):
        save_image(out / f"{path.stem}-draw-{k + 1}.png", result[0])
    difference = consistency(image, results.flatten(0, 1))
    plot.upscaling_panel(out / f"{path.stem}-panel.png", image, results, truth)
    yield (
        f"{path}: {draws} draws of {finest}×{finest} in {out}; averaged back to "
        f"{target}×{target} they differ from the input by at most {difference:.2f} grey levels"
    )


def consistency(inputs: Tensor, draws: Tensor) -> float:
    """Largest difference, in grey levels, between block means of draws and their inputs."""
    factor = draws.shape[-1] // inputs.shape[-1]
    means = torch.nn.functional.avg_pool2d(draws.double(), factor)
    return float((means - inputs.double()).abs().max())


def _reduced(images: Tensor, side: int) -> Tensor:
    """8-bit averages of uint8 images at a smaller side."""
    factor = images.shape[-1] // side
    means = torch.nn.functional.avg_pool2d(images.double(), factor)
    return means.round().to(torch.uint8)


def _digits(result: evaluate.Evaluation | evaluate.LevelReport) -> str:
    return f"{result.bpd:.3f} ± {result.bpd_stderr:.3f}"


def _report(result: evaluate.Evaluation, images: Tensor, seconds: float) -> str:
    classical = [
        (name, *(classical_bits(images, form, mosaic=mosaic) for mosaic in (True, False)))
        for name, form in (("PNG", "PNG"), ("lossless WebP", "WEBP"))
    ]
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
        *[f"| {name}, all images in one mosaic | {tiled:.3f} |" for name, tiled, _ in classical],
        *[f"| {name}, one file per image | {alone:.3f} |" for name, _, alone in classical],
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
