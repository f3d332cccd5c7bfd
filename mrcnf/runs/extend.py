"""Configurations derived from a run's: its finest level's, and that of the next finer one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from mrcnf import plugins
from mrcnf.errors import UserError
from mrcnf.runs import config
from mrcnf.runs.agreement import SHARED, Origin, check_finest
from mrcnf.runs.checkpoint import CONFIG, describe, find_levels, level_folder, load
from mrcnf.runs.config import Config


def finest_config(run: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration of a run's finest level, with overrides."""
    return config.load(finest_folder(run) / CONFIG, overrides)


def finest_folder(run: Path | str) -> Path:
    """The folder of a run's finest level."""
    return level_folder(Path(run), max(find_levels(run)))


def extended_config(
    run: Path,
    out: Path,
    resolution: int,
    overrides: Sequence[str] = (),
    resume: bool = False,
    *,
    trust: bool = False,
) -> Config:
    """The configuration for the next finest level of a run: the finest level's, one level up.

    With `resume`, that of the level as it was begun in `out`, if it was.

    Args:
        trust: run the code that the run names, if it does; training will.

    Raises:
        UserError: the level is there already, is not the next one, or the run's levels are of no
            use below it.
    """
    begun = level_folder(out, resolution) / CONFIG
    if begun.exists() and resume:
        found = config.load(begun, overrides)
        plugins.require_trust(config.own_names(found), begun.parent, trust)
        return found
    if resolution in find_levels(run):
        raise UserError(f"{run} has a level {resolution} already; add --resume to go on with it")
    plugins.require_trust(config.own_names(finest_config(run)), run, trust)
    model = load(run, trust=trust).config
    if resolution != 2 * model.finest:
        raise UserError(
            f"the finest level of {run} is {model.finest}: extend it to {2 * model.finest}, "
            f"not {resolution}"
        )
    for metadata in describe(run).values():
        check_finest(Origin.of(Path(run), metadata), resolution)
    levels = json.dumps([*model.resolutions, resolution])
    # The finest level's starting weights are none for the new level, and other images may have no
    # test split for a curve. What was the data's choice then is the levels' now.
    own = [
        f"model.resolutions={levels}", f"model.channels={model.channels}", "train.init=",
        "train.init_level=0", "train.evaluate_every=0",
    ]  # fmt: skip
    settings = finest_config(run, [*own, *overrides])
    wanted = dataclasses.replace(model, resolutions=(*model.resolutions, resolution))
    for name in ("resolutions", *SHARED):
        found, shared = getattr(settings.model, name), getattr(wanted, name)
        if found != shared:
            raise UserError(
                f"model.{name} = {found} does not fit the levels of {run}, which have {shared}"
            )
    return settings
