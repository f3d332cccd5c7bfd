"""The commands. Each reads its arguments, calls the library, and prints what came back."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import os
import re
import sys
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import tyro

from mrcnf import demo as demonstration
from mrcnf import files, runtime
from mrcnf.data.imagefile import save_image
from mrcnf.errors import UserError
from mrcnf.flows.solve import SolverError
from mrcnf.measure import check as checks
from mrcnf.measure import evaluate as evaluation
from mrcnf.report import compare as comparison
from mrcnf.report import plot
from mrcnf.runs import checkpoint
from mrcnf.runs import config as configuration
from mrcnf.training import trainer as training

app = tyro.extras.SubcommandApp()

COMMANDS: list[str] = []


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command; parsing its arguments returns the call, to be made afterwards."""

    @functools.wraps(function)
    def deferred(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(function, *arguments, **options)

    COMMANDS.append(function.__name__)
    app.command(deferred)
    return function


Overrides = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE")]
Run = tyro.conf.Positional[Path]


@command
def demo(
    out: Path = Path("runs/demo"), resume: bool = False, overrides: Overrides = ()
) -> None:
    """Train three levels on embedded photographs, evaluate, draw samples, write a report.

    Args:
        out: run folder to make.
        resume: go on from the run folder's checkpoints.
        overrides: settings to change, section.key=value.
    """
    print(demonstration.run(out, overrides, resume=resume))


@command
def train(
    config: tyro.conf.Positional[Path],
    level: int = 0,
    out: Path | None = None,
    resume: bool = False,
    joint: bool = False,
    dry_run: bool = False,
    overrides: Overrides = (),
) -> None:
    """Train one level of a configuration, or all of them one after another.

    Args:
        config: a TOML file, see experiments/.
        level: resolution of the level to train; 0 trains all.
        out: run folder; runs/NAME by default.
        resume: go on from the run folder's checkpoints.
        joint: train all levels side by side, a step of each in turn.
        dry_run: print the resolved configuration and stop.
        overrides: settings to change, section.key=value.
    """
    settings = configuration.load(config, overrides)
    if dry_run:
        print(configuration.to_toml(settings.at_level(level) if level else settings), end="")
        return
    resolutions = [level] if level else list(settings.model.resolutions)
    run = out or Path("runs") / settings.name
    training.train_levels(settings, resolutions, run, resume=resume, joint=joint)
    _say_trained(run, resolutions)


@command
def extend(
    run: Run,
    resolution: int,
    out: Path | None = None,
    resume: bool = False,
    overrides: Overrides = (),
) -> None:
    """Add the next finest level to a trained model, and train that level alone.

    Args:
        run: a trained run.
        resolution: of the new level, twice the finest one's.
        out: run folder for the larger model (the old levels are copied); RUN by default.
        resume: go on from the new level's checkpoint.
        overrides: settings of the new level, section.key=value; the others are the finest level's.
    """
    target = out or run
    settings = checkpoint.extended_config(run, target, resolution, overrides, resume)
    if target != run:
        checkpoint.assemble([run], target, keep=resume)
    training.train_levels(settings, [resolution], target, resume=resume)
    _say_trained(target, [resolution])


@command
def evaluate(
    run: Run,
    level: int = 0,
    data: str = "",
    split: str = "test",
    limit: int | None = None,
    draws: int | None = None,
    batch: int | None = None,
    convergence: bool = False,
    json: Path | None = None,
    device: str = "auto",
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
        json: file to write the numbers to.
        device: auto, cpu, cuda, cuda:N.
        overrides: settings of data, evaluate, solver and trace, e.g. solver.steps=80.
    """
    numbers = {"limit": limit, "draws": draws, "batch": batch}
    given = [f"evaluate.{name}={n}" for name, n in numbers.items() if n is not None]
    assignments = [f"data.name={dumps(data)}"] if data else []
    settings = checkpoint.finest_config(run, [*assignments, *given, *overrides])
    with runtime.processes(device):
        where = runtime.choose_device(device)
        model = [checkpoint.load_level(run, level, where)] if level else checkpoint.load(run, where)
        levels = list(model)
        evaluation.set_solvers(levels, configuration.override({}, overrides))
        images = training.load_images(settings.data, levels[0].model, split)
        how = settings.evaluate
        result = evaluation.evaluate(
            levels,
            images,
            limit=how.limit,
            batch=how.batch,
            draws=how.draws,
            seed=how.seed,
            progress=sys.stderr.isatty(),
        )
        if convergence:
            result.convergence = evaluation.convergence(
                levels, images, limit=min(100, how.limit or 100), batch=how.batch, seed=how.seed
            )
    if not _speaks():
        return
    _note_unfinished(run)
    print(result)
    if json is not None:
        files.write(json, result.to_json() + "\n")


@command
def sample(
    run: Run,
    n: int = 64,
    neighbours: int = 0,
    out: Path = Path("samples.png"),
    temperature: float = 1.0,
    zoom: int = 2,
    seed: int = 0,
    device: str = "auto",
    overrides: Overrides = (),
) -> None:
    """Draw images and write them as one grid.

    Args:
        run: a trained run.
        n: number of images.
        neighbours: put each image in a row of its own, with so many of the training images that
            are nearest to it (Euclidean distance of the pixels); 0 shows the images alone.
        out: PNG file.
        temperature: standard deviation of the latent noise.
        zoom: show each pixel as a square of this side.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:N.
        overrides: settings of data, for the training images, e.g. data.root=DIR.
    """
    if min(n, zoom) < 1:
        raise UserError(f"n and zoom must be at least 1, got {n} and {zoom}")
    if neighbours < 0:
        raise UserError(f"neighbours must not be negative, got {neighbours}")
    ignored = set(configuration.override({}, overrides)) - ({"data"} if neighbours else set())
    if ignored:
        raise UserError(
            f"sampling would ignore {sorted(ignored)[0]}; it takes settings of data, "
            "with --neighbours"
        )
    model = checkpoint.load(run, runtime.choose_device(device))
    _note_unfinished(run)
    among = None
    if neighbours:
        settings = checkpoint.finest_config(run, overrides)
        among = training.load_images(settings.data, model.config, "train").pixels
        if len(among) < neighbours:
            raise UserError(f"{neighbours} neighbours are more than the {len(among)} images")
    generator = torch.Generator(model.device).manual_seed(seed)
    images = model.sample(n, temperature=temperature, generator=generator).cpu()
    if among is not None:
        found = among[evaluation.nearest(images, among, neighbours)]
        images = torch.cat((images[:, None], found), 1).flatten(0, 1)
    save_image(out, plot.grid(images, columns=neighbours and neighbours + 1, zoom=zoom))
    print(out)


@command
def upscale(
    run: Run,
    images: tyro.conf.Positional[tuple[Path, ...]],
    out: Path,
    level: int = 0,
    draws: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Draw the finest images of which the given ones are averages.

    Args:
        run: a trained run.
        images: image files.
        out: folder for NAME-draw-K.png and NAME-panel.png.
        level: first reduce the images to this level's resolution (the panel then shows them as
            the truth); 0 takes the largest level that the image's size allows.
        draws: samples per image.
        temperature: standard deviation of the latent noise.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:N.
    """
    if not images:
        raise UserError("no image to upscale; name at least one image file")
    model = checkpoint.load(run, runtime.choose_device(device))
    for path in images:
        for line in demonstration.upscale_file(
            model, path, out, level=level, draws=draws, temperature=temperature, seed=seed
        ):
            print(line)


@command
def assemble(
    runs: tyro.conf.Positional[tuple[Path, ...]], out: Path, half: bool = False
) -> None:
    """Copy levels that were trained in different run folders into one.

    Args:
        runs: run folders whose levels belong together.
        out: run folder to make.
        half: make copies for use only, with float16 weights and nothing to resume from.
    """
    if not runs:
        raise UserError("no levels to assemble; name at least one run folder")
    print(f"{out}: levels {', '.join(map(str, checkpoint.assemble(runs, out, half=half)))}")


@command
def info(run: Run) -> None:
    """What a run holds: levels, sizes, training, data.

    Args:
        run: a run folder.
    """
    for resolution, metadata in checkpoint.describe(run).items():
        weights = checkpoint.level_folder(run, resolution) / checkpoint.WEIGHTS
        field = ", ".join(f"{key} {value}" for key, value in metadata["field"].items())
        print(
            f"level {resolution}: {metadata['parameters']:,} parameters ({field}); "
            f"{metadata['objective']}, step {metadata['step']} of {metadata['steps']}"
            f"{' (unfinished)' if metadata['step'] < metadata['steps'] else ''}, "
            f"{metadata['seconds'] / 60:.1f} min; {metadata['data_name']} "
            f"(sha256 {metadata['data'][:12]}…); {weights.stat().st_size / 1e6:.1f} MB"
        )


@command
def compare(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """A table of runs: how they differ, what they cost, and their bits/dim on test images.

    Args:
        runs: run folders, trained with train.evaluate_every for the bits/dim.
        out: PNG file for the curves of bits/dim against training time.
    """
    rows = comparison.compare(runs)
    if out is not None:
        plot.bpd_curves(out, runs)
    print(comparison.table(rows))


@command
def check(json: Path | None = None) -> None:
    """Prove the numerics on this machine, in seconds.

    Args:
        json: file to write the findings to.
    """
    findings = []
    for finding in checks.run():
        findings.append(finding)
        verdict = "ok    " if finding.holds else "FAILED"
        print(f"{verdict} {finding.claim}: {finding.measured:.2g} (bound {finding.bound:.0e})")
    if json is not None:
        files.write(json, dumps([finding._asdict() for finding in findings], indent=2))
    if not all(finding.holds for finding in findings):
        raise RuntimeError("a numerical check failed on this machine; please report its line")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit status 0, 2 for the user's mistakes, 1 for anything else."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        parse(arguments)()
    except UserError as error:
        _fail(str(error), 2)
    except (SolverError, training.TrainingError) as error:
        _fail(str(error), 1)
    except (RuntimeError, MemoryError) as error:
        if not runtime.out_of_memory(error):
            raise
        advice = "halve the batch (train.batch, --batch, --n), or double train.micro_batches"
        _fail(f"out of memory: {advice} ({str(error).splitlines()[0]})", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 1)


def parse(arguments: list[str]) -> Callable[[], None]:
    """The call that the arguments ask for; what tyro says of mistakes becomes one line."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {arguments[0]!r}; {hint}")
    arguments, said = gather_overrides(arguments), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return app.cli(
                prog="mrcnf",
                description="Multi-resolution continuous normalizing flows.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip(" │╭╮╰╯─") for line in said.getvalue().splitlines()]
        words = " ".join(line for line in lines[1:] if line.strip("-"))
        what = re.split(" (?:For full|Argument) helptext", words)[0]
        raise UserError(f"{what.rstrip('.')}; see mrcnf --help") from None


def gather_overrides(arguments: list[str]) -> list[str]:
    """Move `section.key=value`, `--section.key=value` and `--section.key value` behind one flag.

    Section names contain no slash and no capital, so paths such as ./a.png are left alone.
    """
    rest, overrides = [], []
    pending = iter(arguments)
    for argument in pending:
        if re.fullmatch(r"(--)?[a-z_]+(\.[a-z0-9_-]+)+=.*", argument, flags=re.DOTALL):
            overrides.append(argument.removeprefix("--"))
        elif re.fullmatch(r"--[a-z_]+(\.[a-z0-9_-]+)+", argument):
            value = next(pending, None)
            if value is None:
                _fail(f"{argument} needs a value", 2)
            overrides.append(f"{argument.removeprefix('--')}={value}")
        else:
            rest.append(argument)
    return [*rest, "--overrides", *overrides] if overrides else rest


def _say_trained(run: Path, resolutions: list[int]) -> None:
    if _speaks():
        print(f"{run}: trained level {', '.join(map(str, resolutions))}")


def _speaks() -> bool:
    """Under torchrun one process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _note_unfinished(run: Path) -> None:
    for note in checkpoint.unfinished(run):
        print(f"mrcnf: note: {note}", file=sys.stderr)


def _fail(message: str, status: int) -> NoReturn:
    print(f"mrcnf: {message}", file=sys.stderr)
    raise SystemExit(status)
