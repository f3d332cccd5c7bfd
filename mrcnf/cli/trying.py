"""The commands that try a model on images that it should find strange: attack, ood."""

from __future__ import annotations

import dataclasses
import sys
from json import dumps
from pathlib import Path
from typing import Annotated

import tyro

from mrcnf import files, runtime
from mrcnf.cli.common import Overrides, Run, note_unfinished, speaks
from mrcnf.codec import pictures
from mrcnf.data import datasets
from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.measure import attack as attacks
from mrcnf.measure import ood as detection
from mrcnf.measure.evaluate import set_solvers
from mrcnf.measure.robustness import robustness
from mrcnf.model.settings import ModelConfig
from mrcnf.report import plot
from mrcnf.report.plot import check_figure
from mrcnf.runs import checkpoint
from mrcnf.runs import config as configuration
from mrcnf.runs.extend import finest_config
from mrcnf.runs.images import match_model, open_images
from mrcnf.runs.settings import DataConfig

Epsilons = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N…")]
Scores = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME…")]


def attack(
    run: Run,
    data: str = "",
    epsilon: Epsilons = (1, 2, 4, 8),
    limit: int = 32,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    draws: int = 1,
    minimise: bool = False,
    transfer: Path | None = None,
    batch: int = 8,
    seed: int = 0,
    json: Path | None = None,
    save: Path | None = None,
    plot: Path | None = None,
    device: str = "auto",
    trust: bool = False,
    overrides: Overrides = (),
) -> None:
    """Alter test images within ±ε grey levels until they cost the model many bits.

    Args:
        run: a trained run.
        data: name of the images; the training data's by default.
        epsilon: how far a pixel may move, in grey levels; one row for each.
        limit: attack the first so many test images, 0 for all.
        steps: gradients per restart.
        step_size: the first step in grey levels, by default ε, or ε/4 with --minimise; steps
            fall to 0 along a cosine.
        restarts: starts, the best of which counts: the image, then others in the ball.
        draws: draws of noise and probes that a gradient, and an evaluation, is the mean of.
        minimise: make the images cost few bits instead: outliers that are to look typical.
        transfer: another run, to attack through that one too and evaluate on this one.
        batch: images at once, their solves with gradients; lower it if memory runs out.
        seed: of starts, noise and probes.
        json: file to write the numbers to.
        save: NAME.npz for the attacked images; with several ε, NAME-eE.npz each.
        plot: PNG, PDF or SVG file for bits/dim against the number of steps; attacks with fewer
            steps too.
        device: auto, cpu, cuda, cuda:N.
        trust: run the code that the run names of its own, if it does: read it first.
        overrides: settings of data, solver and trace, section.key=value.
    """
    if plot is not None:
        check_figure(plot)
    if save is not None and save.suffix != ".npz":
        raise UserError(f"{save}: attacked images are written as an archive; end the name in .npz")
    if limit < 0:
        raise UserError(f"limit must be at least 0 (all images), got {limit}")
    attacks.check(epsilon, steps, step_size, restarts, draws, batch)
    settings = _settings(run, data, overrides)
    changes = configuration.override({}, overrides)
    with runtime.processes(device) as where:
        levels = list(checkpoint.load(run, where, trust=trust))
        set_solvers(levels, changes)
        others = None
        if transfer is not None:
            others = list(checkpoint.load(transfer, where, trust=trust))
            set_solvers(others, changes)
        images = open_images(settings.data, levels[0].model, "test", run=run, trust=trust)
        found = robustness(
            levels,
            images.pixels[: limit or None],
            epsilon,
            data=f"{images.name} {images.split}",
            transfer=others,
            steps=steps,
            step_size=step_size,
            restarts=restarts,
            draws=draws,
            minimise=minimise,
            budgets=_budgets(steps) if plot is not None else (),
            batch=batch,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
    if not speaks():
        return
    note_unfinished(run)
    print(found)
    if json is not None:
        table = {"run": str(run), "transfer": str(transfer or ""), "seed": seed, "draws": draws}
        files.write(json, dumps(table | found.to_dict(), indent=2) + "\n")
    if save is not None:
        for radius, pixels in found.pixels.items():
            path = save if len(epsilon) == 1 else save.with_name(f"{save.stem}-e{radius}.npz")
            names = [f"e{radius}-{i:05d}" for i in range(len(pixels))]
            pictures.write_npz(path, names, list(pixels))
    if plot is not None:
        _plot_attack(plot, found.rows)


def ood(
    run: Run,
    against: str,
    data: str = "",
    limit: int = 1000,
    scores: Scores = (),
    draws: int = 1,
    batch: int = 100,
    seed: int = 0,
    json: Path | None = None,
    plot: Path | None = None,
    device: str = "auto",
    trust: bool = False,
    overrides: Overrides = (),
) -> None:
    """Tell test images of the training data from others by their scores: AUROC with intervals.

    Args:
        run: a trained run.
        against: name of the other images, grey ones of which are repeated for a model of colour;
            or constant, noise, or patches:P for the run's test images with patches of P×P
            pixels shuffled.
        data: name of the images that are like the training data; that itself by default.
        limit: take the first so many images of either, 0 for all.
        scores: likelihood, level-R, complexity, typicality; all by default.
        draws: dequantisation draws per image, averaged.
        batch: images at once.
        seed: of noise, probes, images that are drawn, and resamples.
        json: file to write the numbers to.
        plot: PNG, PDF or SVG file for histograms of the scores.
        device: auto, cpu, cuda, cuda:N.
        trust: run the code that the run names of its own, if it does: read it first.
        overrides: settings of data, solver and trace, section.key=value.
    """
    if plot is not None:
        check_figure(plot)
    if limit < 0 or min(draws, batch) < 1:
        raise UserError(
            f"draws {draws} and batch {batch} must be at least 1, and limit {limit} at least 0"
        )
    settings = _settings(run, data, overrides)
    with runtime.processes(device) as where:
        levels = list(checkpoint.load(run, where, trust=trust))
        set_solvers(levels, configuration.override({}, overrides))
        detection.check_names(levels, scores)
        model = levels[0].model
        test = open_images(settings.data, model, "test", run=run, trust=trust)
        inside = test.first(limit or None)
        outside = _outside(against, settings.data, model, inside, seed).first(limit or None)
        if min(len(inside), len(outside)) < 2:
            raise UserError("the sets have a single image; at least 2 are needed of either")
        training, left_out = None, ""
        if not scores or "typicality" in scores:
            try:
                own = dataclasses.replace(
                    finest_config(run).data, root=settings.data.root,
                    download=settings.data.download,
                )  # fmt: skip
                seen = open_images(own, model, "train", run=run, trust=trust)
                training = seen.first(limit or None).pixels
            except UserError as error:
                if scores:
                    raise
                left_out = f"typicality is left out, as it needs training images ({error})"
        found = detection.detect(
            levels, inside, outside, wanted=scores, training=training, left_out=left_out,
            batch=batch, draws=draws, seed=seed, progress=sys.stderr.isatty(),
        )  # fmt: skip
    if not speaks():
        return
    note_unfinished(run)
    print(found)
    if json is not None:
        table = {"run": str(run), "seed": seed, "draws": draws}
        files.write(json, dumps(table | found.to_dict(), indent=2) + "\n")
    if plot is not None:
        _plot_scores(plot, found)


_plot_attack, _plot_scores = plot.attack_curves, plot.score_histograms  # arguments are called plot


def _settings(run: Path, data: str, overrides: tuple[str, ...]) -> configuration.Config:
    return finest_config(run, [*([f"data.name={dumps(data)}"] if data else []), *overrides])


def _budgets(steps: int) -> list[int]:
    """1, 2, 4, … and so many steps."""
    return [*(2**i for i in range(steps.bit_length()) if 2**i < steps), steps]


def _outside(
    name: str, settings: DataConfig, model: ModelConfig, inside: Images, seed: int
) -> Images:
    """The images that `--against` names, as the model takes them."""
    n, side = len(inside), model.finest
    kind, _, size = name.partition(":")
    if name == "constant":
        return Images(detection.constant(n, model.channels, side, seed=seed), name, "")
    if name == "noise":
        return Images(detection.noise(n, model.channels, side, seed=seed), name, "")
    if kind == "patches":
        if not size.isdecimal():
            raise UserError(f"--against {name}: say the patches' side in pixels, e.g. patches:4")
        pixels = detection.shuffled(inside.pixels, int(size), seed=seed)
        return Images(pixels, name, "", inside.groups)
    try:
        images = datasets.load(
            name, "test", root=settings.root, resolution=side,
            download=settings.download,
        )  # fmt: skip
    except UserError as error:
        if "is unknown" not in str(error):
            raise
        raise UserError(f"--against: {error}, constant, noise, patches:P") from None
    if model.channels == 3 and images.pixels.shape[1] == 1:
        pixels = images.pixels.expand(-1, 3, -1, -1).contiguous()
        images = Images(pixels, images.name, images.split, images.groups)
    match_model(model, images)
    return images
