"""Training the levels of a run: one after another, or a step of each in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mrcnf import plugins, runtime
from mrcnf.runs import checkpoint
from mrcnf.runs import config as configuration
from mrcnf.runs.config import Config
from mrcnf.runs.images import match_model, open_images
from mrcnf.runs.metrics import Logger, loggers_of
from mrcnf.training.live import Live
from mrcnf.training.resume import refuse_used
from mrcnf.training.trainer import Trainer


def train(
    config: Config | Path | str,
    level: int | None = None,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    joint: bool = False,
    overrides: Sequence[str] = (),
    progress: bool = True,
    logger: Logger | list[Logger] | None = None,
) -> Path:
    """Train all levels of a configuration, or one of them; returns the run folder.

    Args:
        config: what to train, or a path of TOML that says it.
        level: resolution of the one level to train.
        out: the run folder; by default runs/NAME, with the configuration's name.
        resume: go on from the folder's checkpoints.
        joint: train the levels side by side, a step of each in turn, to the same weights.
        overrides: settings to change, `section.key=value` each.
        progress: show how far it is, on stderr.
        logger: any object with a method `log(dict, step)`, or a list of them: each is told every
            line of each level's metrics.jsonl, with names such as `level-16/loss`.

    Raises:
        UserError: settings, images or the folder do not fit; nothing has been written.
        TrainingError: too many steps in a row were skipped; the checkpoints so far are there.
        KeyboardInterrupt: SIGTERM or Ctrl-C came; each level begun has left a checkpoint.
    """
    if isinstance(config, Config):
        table = configuration.override(configuration.to_table(config), overrides)
        settings = configuration.from_table(table)
    else:
        settings = configuration.load(config, overrides)
    run = Path("runs") / settings.name if out is None else Path(out)
    resolutions = settings.model.resolutions if level is None else [level]
    folders = [] if isinstance(config, Config) else [Path(config).parent]
    with plugins.beside(*folders):
        train_levels(
            settings, resolutions, run,
            resume=resume, joint=joint, progress=progress, logger=logger,
        )  # fmt: skip
    return run


def train_levels(
    config: Config,
    resolutions: Sequence[int],
    run: Path,
    *,
    resume: bool = False,
    joint: bool = False,
    progress: bool = True,
    logger: Logger | list[Logger] | None = None,
    ready: Callable[[], object] = lambda: None,
) -> None:
    """Train some levels of a configuration into a run folder; otherwise as `train`.

    Levels share neither parameters nor gradients, so `joint` gives the same weights.

    Args:
        ready: called when nothing is left to refuse, before the first step.
    """
    loggers = loggers_of(logger)
    for resolution in resolutions:  # at once, not when the earlier levels are done
        refuse_used(checkpoint.level_folder(run, resolution), resume)
    own = [config.at_level(resolution).train for resolution in resolutions]
    with (
        runtime.processes(config.train.device) as device,
        runtime.stop_on_signal(device) as stop,
    ):
        images = open_images(config.data, config.model, "train")
        # Not config.model: its channels may be 0, and then any number of them would pass.
        model = match_model(config.model, images)
        watched = any(train.evaluate_every for train in own)
        test = open_images(config.data, model, "test") if watched else None

        @functools.cache
        def pixels_on(device: torch.device) -> Tensor:
            return images.pixels.to(device)

        trainers = [
            Trainer(
                config, resolution, images, run, resume, test,
                pixels=None if images.mapped else pixels_on(runtime.choose_device(train.device)),
                loggers=loggers,
            )
            for resolution, train in zip(resolutions, own, strict=True)
        ]  # fmt: skip
        ready()
        if joint:
            _in_turn(trainers, stop, progress)
        else:
            for trainer in trainers:
                trainer.run(progress=progress, stop=stop)
                if stop():
                    break
        stopped = stop()
    if stopped:
        raise KeyboardInterrupt


def _in_turn(trainers: Sequence[Trainer], stop: Callable[[], bool], progress: bool) -> None:
    for trainer in trainers:
        trainer.begin()

    def done() -> float:
        return sum(min(trainer.progress, 1.0) for trainer in trainers) / len(trainers)

    shown = progress and runtime.rank_and_world()[0] == 0
    with Live("all levels", shown, done()) as live:
        while not stop() and (unfinished := [t for t in trainers if not t.finished]):
            rows = [trainer.advance() for trainer in unfinished]
            said = "; ".join(f"level {t.resolution}: {t.said()}" for t in trainers)
            live.show(done(), said, any(row is not None for row in rows))
    for trainer in trainers:
        trainer.save_if_new()
