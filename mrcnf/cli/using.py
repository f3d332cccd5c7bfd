"""The commands that use a trained model: evaluate, sample, upscale."""

from __future__ import annotations

import dataclasses
import sys
from json import dumps
from pathlib import Path

import torch

from mrcnf import files, runtime, seeds
from mrcnf.cli.common import Overrides, Paths, Run, note_unfinished, speaks
from mrcnf.data.imagefile import check_png, save_image
from mrcnf.errors import UserError
from mrcnf.image.grid import grid
from mrcnf.measure import evaluate as evaluation
from mrcnf.measure.nearest import nearest
from mrcnf.report import upscaling
from mrcnf.runs import checkpoint
from mrcnf.runs import config as configuration
from mrcnf.runs.extend import finest_config
from mrcnf.runs.images import open_images


def evaluate(
    run: Run,
    level: int = 0,
    data: str = "",
    split: str = "test",
    limit: int | None = None,
    draws: int | None = None,
    batch: int | None = None,
    convergence: bool = False,
    compile: bool = False,
    tolerance: float | None = None,
    json: Path | None = None,
    device: str = "auto",
    trust: bool = False,
    overrides: Overrides = (),
) -> None:
    """Bits per dimension on test images, by level and in total, with standard errors.

    Args:
        run: a trained run.
        level: evaluate this level alone, of a run that may lack the others; 0: all.
        data: name of the images; the training data's by default.
        split: train, test or val.
        limit: evaluate the first so many images, 0 for all; the run's evaluate.limit by default.
        draws: dequantisation draws per image; the run's evaluate.draws by default.
        batch: images solved together; the run's evaluate.batch by default.
        convergence: solve a subset again, more finely, to show that the digits hold.
        compile: compile the networks first, as evaluate.compile=true.
        tolerance: solve in fewer steps and add what they are off by, as some images show, with
            a standard error of about so many bits/dim; the run's evaluate.tolerance by default.
        json: file to write the numbers to.
        device: auto, cpu, cuda, cuda:N.
        trust: run the code that the run names of its own, if it does: read it first.
        overrides: settings of data, evaluate, solver and trace, e.g. solver.steps=80.
    """
    numbers = {"limit": limit, "draws": draws, "batch": batch, "tolerance": tolerance}
    given = [f"evaluate.{name}={n}" for name, n in numbers.items() if n is not None]
    given += ["evaluate.compile=true"] if compile else []
    assignments = [f"data.name={dumps(data)}"] if data else []
    settings = finest_config(run, [*assignments, *given, *overrides])
    with runtime.processes(device) as where:
        model = (
            [checkpoint.load_level(run, level, where, trust=trust)]
            if level
            else checkpoint.load(run, where, trust=trust)
        )
        levels = list(model)
        evaluation.set_solvers(levels, configuration.override({}, overrides))
        if convergence:
            evaluation.check_solved(levels)
        images = open_images(settings.data, levels[0].model, split, run=run, trust=trust)
        how = settings.evaluate
        result = evaluation.evaluate(
            levels, images, **dataclasses.asdict(how), progress=sys.stderr.isatty()
        )
        if convergence:
            result.convergence = evaluation.convergence(
                levels, images, limit=min(100, how.limit or 100), batch=how.batch, seed=how.seed
            )
    if not speaks():
        return
    note_unfinished(run)
    print(result)
    if json is not None:
        files.write(json, result.to_json() + "\n")


def sample(
    run: Run,
    n: int = 64,
    size: tuple[int, int] | None = None,
    neighbours: int = 0,
    out: Path = Path("samples.png"),
    temperature: float = 1.0,
    zoom: int = 2,
    seed: int = 0,
    device: str = "auto",
    trust: bool = False,
    overrides: Overrides = (),
) -> None:
    """Draw images and write them as one grid.

    Args:
        run: a trained run.
        n: number of images.
        size: height and width of the images in pixels; the finest level's by default.
        neighbours: put each image in a row of its own, with so many of the training images that
            are nearest to it (Euclidean distance of the pixels); 0 shows the images alone.
        out: PNG file.
        temperature: standard deviation of the latent noise.
        zoom: show each pixel as a square of this side.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:N.
        trust: run the code that the run names of its own, if it does: read it first.
        overrides: settings of data, for the training images, e.g. data.root=DIR.
    """
    if min(n, zoom) < 1:
        raise UserError(f"n and zoom must be at least 1, got {n} and {zoom}")
    check_png(out)
    if neighbours < 0:
        raise UserError(f"neighbours must not be negative, got {neighbours}")
    ignored = set(configuration.override({}, overrides)) - ({"data"} if neighbours else set())
    if ignored:
        raise UserError(
            f"sampling would ignore {sorted(ignored)[0]}; it takes settings of data, "
            "with --neighbours"
        )
    model = checkpoint.load(run, runtime.choose_device(device), trust=trust)
    note_unfinished(run)
    among = None
    if neighbours:
        settings = finest_config(run, overrides)
        among = open_images(
            settings.data, model.config, "train", run=run, trust=trust
        ).pixels
        if len(among) < neighbours:
            raise UserError(f"{neighbours} neighbours are more than the {len(among)} images")
        if size not in (None, tuple(among.shape[2:])):
            raise UserError(
                f"images of another size than the data's {among.shape[2]}×{among.shape[3]} have "
                "no neighbours among them; leave out --size or --neighbours"
            )
    generator = seeds.generator(seed, model.device)
    images = model.sample(n, temperature=temperature, generator=generator, size=size).cpu()
    if among is not None:
        images = torch.cat((images[:, None], among[nearest(images, among, neighbours)]), 1)
        images = images.flatten(0, 1)
    save_image(out, grid(images, columns=neighbours and neighbours + 1, zoom=zoom))
    print(out)


def upscale(
    run: Run,
    images: Paths,
    out: Path,
    level: int = 0,
    reduce: bool = False,
    draws: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    trust: bool = False,
) -> None:
    """Draw finer images of which the given ones, of any size, are averages.

    Args:
        run: a trained run.
        images: image files.
        out: folder for NAME-draw-K.png and NAME-panel.png.
        level: the level at whose scale the images are: results are finest / level times as large;
            0 takes the level of the image's size, otherwise the one below the finest.
        reduce: first average the images down by finest / level; they are then the truth, which
            the panel shows.
        draws: samples per image.
        temperature: standard deviation of the latent noise.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:N.
        trust: run the code that the run names of its own, if it does: read it first.
    """
    if not images:
        raise UserError("no image to upscale; name at least one image file")
    model = checkpoint.load(run, runtime.choose_device(device), trust=trust)
    for line in upscaling.upscale_files(
        model, images, out, level=level, reduce=reduce, draws=draws, temperature=temperature,
        seed=seed,
    ):  # fmt: skip
        print(line)
