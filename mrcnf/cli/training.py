"""The commands that make a model: demo, train, extend, assemble, calibrate."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import tyro
from tqdm import tqdm

from mrcnf import demo as demonstration
from mrcnf import plugins, seeds
from mrcnf.cli.common import Overrides, Paths, Run, speaks
from mrcnf.codec import tuning
from mrcnf.errors import UserError
from mrcnf.runs import assemble as assembling
from mrcnf.runs import calibration, checkpoint
from mrcnf.runs import config as configuration
from mrcnf.runs.calibration import fields_of
from mrcnf.runs.extend import extended_config, finest_config, finest_folder
from mrcnf.runs.images import open_images
from mrcnf.training import levels as training
from mrcnf.training.calibrate import calibrate as fit_heads


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
    with plugins.beside(config.parent):
        run = training.train(settings, level or None, out, resume=resume, joint=joint)
    _say_trained(run, [level] if level else list(settings.model.resolutions))


def extend(
    run: Run,
    resolution: int,
    out: Path | None = None,
    resume: bool = False,
    trust: bool = False,
    overrides: Overrides = (),
) -> None:
    """Add the next finest level to a trained model, and train that level alone.

    Args:
        run: a trained run.
        resolution: of the new level, twice the finest one's.
        out: run folder for the larger model (the old levels are copied); RUN by default.
        resume: go on from the new level's checkpoint.
        trust: run the code that the run names of its own, if it does: read it first.
        overrides: settings of the new level, section.key=value; the others are the finest level's.
    """
    target = out or run
    settings = extended_config(run, target, resolution, overrides, resume, trust=trust)

    def copy() -> None:
        if target != run:
            assembling.assemble([run], target, keep=resume, trust=trust)

    # Without trust the run names no code: what the overrides name is not looked for in it.
    folders = [checkpoint.level_folder(target, resolution), finest_folder(run)] if trust else []
    with plugins.beside(*folders):
        training.train_levels(settings, [resolution], target, resume=resume, ready=copy)
    _say_trained(target, [resolution])


def assemble(runs: Paths, out: Path, half: bool = False, trust: bool = False) -> None:
    """Copy levels that were trained in different run folders into one.

    Args:
        runs: run folders whose levels belong together.
        out: run folder to make.
        half: make copies for use only, with float16 weights and nothing to resume from.
        trust: run the code that the runs name of their own, if they do: read it first.
    """
    if not runs:
        raise UserError("no levels to assemble; name at least one run folder")
    levels = assembling.assemble(runs, out, half=half, trust=trust)
    print(f"{out}: levels {', '.join(map(str, levels))}")


def calibrate(
    run: Run,
    level: int = 0,
    steps: int = 600,
    images: int = 16,
    trust: bool = False,
    overrides: Overrides = (),
) -> None:
    """Teach a trained run, on its training images, what makes `compress` write smaller files.

    A small head on each level's network learns the network's Jacobian near its diagonal, which
    `trace.method=calibrated` has use for too, and the codec's settings are tried on a few images.
    Both are kept beside the weights, which stay as they are. Files that were compressed before need
    the run as it was before.

    Args:
        run: a trained run.
        level: calibrate this level alone; 0: all that can be.
        steps: of the heads' training, of 32 images each: minutes on one core for a level of 32×32.
        images: that settings are tried on; 0: keep those that there are.
        trust: run the code that the run names of its own, if it does: read it first.
        overrides: settings of data, section.key=value.
    """
    if steps < 1 or images < 0:
        raise UserError(f"--steps {steps} --images {images}: train the heads for at least 1 step")
    model = checkpoint.load(run, trust=trust)
    levels = [model.level(level)] if level else [own for own in model if own.flow.solved]
    if not levels:
        raise UserError(f"{run} has no continuous flow: the steps of others are exact as they are")
    if others := configuration.override({}, overrides).keys() - {"data"}:
        raise UserError(f"{min(others)} has no part in calibration; it takes settings of data")
    settings = finest_config(run, overrides)
    data = open_images(settings.data, model.config, "train", run=run, trust=trust)
    folders, shown = checkpoint.find_levels(run), sys.stderr.isatty()
    for own in levels:
        if fields_of(own) or level:
            with tqdm(total=steps, desc=f"level {own.resolution}", unit="step",
                      disable=not shown) as bar:  # fmt: skip
                missed = fit_heads(own, data, steps=steps, report=lambda *_: bar.update())
            print(f"level {own.resolution}: {1 - missed:.0%} of the Jacobian is known to its head")
            calibration.save(folders[own.resolution], own)
    if not images:
        return
    for own in levels:
        own.coding = {}
    some = tuning.chosen(data.pixels, images, seeds.generator(seeds.seed_of(0, 0, "settings")))
    with tqdm(total=1.0, desc="settings", disable=not shown,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}") as bar:  # fmt: skip
        found, bits = tuning.tune(
            model, some, [own.resolution for own in levels],
            report=lambda share: bar.update(share - bar.n),
        )  # fmt: skip
    for own in levels:
        own.coding = asdict(found[own.resolution])
        calibration.save(folders[own.resolution], own)
        before, after = bits[own.resolution]
        print(
            f"level {own.resolution}: {before:.4f} bits/dim by default, {after:.4f} with "
            + ", ".join(f"{name} {value}" for name, value in own.coding.items())
        )


def _say_trained(run: Path, resolutions: list[int]) -> None:
    if speaks():
        print(f"{run}: trained level {', '.join(map(str, resolutions))}")
