"""Everything that training needs to go on, on disk: a kill at any moment loses no more than steps.

`save` writes the level for use and the state in an order that leaves something to go on from
whenever it is cut short; `restore` takes up whichever state is there.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import Tensor

from mrcnf import plugins, runtime
from mrcnf.errors import UserError
from mrcnf.model.level import Level
from mrcnf.runs import checkpoint
from mrcnf.runs.agreement import rebuilt
from mrcnf.runs.config import Config, own_names, to_table
from mrcnf.runs.tensors import read_tensors, write_tensors
from mrcnf.training.update import Update


def newest(folder: Path) -> Path | None:
    """The state to go on from in a level's folder, if there is one."""
    # A run killed between the two renames of `save` has only the previous state.
    states = (folder / name for name in (checkpoint.STATE, checkpoint.PREVIOUS))
    return next((path for path in states if path.exists()), None)


def take_form(path: Path, level: Level) -> None:
    """Give a level the form of the one that a state is of, before anything is built around it.

    Those of earlier versions may lack what levels have today.
    """
    # What is wrong with a state is for `State.restore` to say.
    with contextlib.suppress(UserError, RuntimeError):
        level.load_state_dict(_of_level(read_tensors(path)[0]))


def _of_level(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "level."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def refuse_used(folder: Path, resume: bool) -> None:
    """A UserError where training into a level's folder would harm what is there."""
    found = newest(folder) is not None
    if not found and (folder / checkpoint.WEIGHTS).exists():
        raise UserError(
            f"{folder} holds weights for use but no state to resume from; choose another --out "
            "(train.init takes the weights along)"
        )
    if found and not resume:
        raise UserError(
            f"{folder} holds a training run already; add --resume to go on with it, or choose "
            "another --out"
        )


class State:
    """The state of one level's training, in memory (`update`) and in its folder.

    Args:
        folder: of the level.
        config: with the level's own settings merged in.
        data: sha256 of the training images.
        update: the weights, their average and moments.
    """

    def __init__(self, folder: Path, config: Config, data: str, update: Update) -> None:
        self.folder, self.config, self.data, self.update = folder, config, data, update
        self.code = plugins.hashes(own_names(config))
        """Of what is of the user's own."""
        self.saved_step = -1
        """Of what is on disk, state and weights for use both."""

    def save(self, step: int, seconds: float, steps: int) -> None:
        """Write the level for use and the state for resuming.

        Args:
            step, seconds: done so far.
            steps: to be done in all.
        """
        update, level = self.update, self.update.level
        tensors = {f"level.{k}": v for k, v in level.state_dict().items()}
        tensors |= {f"average.{i}": average for i, average in enumerate(update.average)}
        tensors |= update.optimizer.state_dict()
        tensors["skipped"] = update.skipped
        progress = {"step": step, "seconds": seconds, "data": self.data}
        extra = {
            **progress,
            "steps": steps,
            "objective": self.config.train.objective,
            "data_name": self.config.data.name,
            **({"code": self.code} if self.code else {}),
            "parameters": sum(p.numel() for p in update.parameters),
            "versions": runtime.versions(),
        }
        weights = update.averaged_state()
        state, previous = self.folder / checkpoint.STATE, self.folder / checkpoint.PREVIOUS
        # The state comes last: whoever finds a finished one need not look at the weights. The
        # first one comes first: weights alone are a copy for use, which is not to be resumed.
        first = newest(self.folder) is None
        if not first:
            checkpoint.save_level(self.folder, level, weights, extra)
        if state.exists():
            state.replace(previous)
        told = {"config": to_table(self.config), "code": self.code}
        write_tensors(state, tensors, progress | told)
        if first:
            checkpoint.save_level(self.folder, level, weights, extra)
        self.saved_step = step

    def restore(self, path: Path) -> tuple[int, float]:
        """Take up a state that `save` wrote; returns the steps and seconds done.

        Raises:
            UserError: it is damaged, of other images, or of another model or optimiser.
        """
        tensors, metadata = self._read(path)
        plugins.warn_if_changed(metadata.get("code", {}), self.code, path)
        level, update = self.update.level, self.update
        try:
            level.load_state_dict(_of_level(tensors))
            for i, average in enumerate(update.average):
                average.copy_(tensors[f"average.{i}"])
            update.optimizer.load_state_dict(tensors)
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{path} does not fit this configuration: {error}") from None
        update.skipped = tensors["skipped"].to(update.skipped.device)
        update.skipped[1:] = 0  # in a row: a resumed run may have been given a remedy
        if (self.folder / checkpoint.WEIGHTS).exists():  # else killed before they were written
            self.saved_step = metadata["step"]
        return metadata["step"], metadata["seconds"]

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            tensors, metadata = read_tensors(path)
        except UserError as error:
            older = self.folder / checkpoint.PREVIOUS
            hint = f"; an older one is at {older}: rename it to {path.name} to go on from there"
            offered = older.exists() and path != older
            raise UserError(f"{error}{hint if offered else ''}") from None
        if metadata["data"] != self.data:
            raise UserError(
                f"{path} was trained on other images, or on the same ones reduced by an earlier "
                "version; resume with the same data"
            )
        then = metadata["config"]
        for section in ("model", "flow", "field"):
            now = getattr(self.config, section)
            table = to_table(rebuilt(type(now), then.get(section, {}), path))
            if table != to_table(now):
                raise UserError(
                    f"{path} is a checkpoint of another model: its [{section}] is {table}"
                )
        return tensors, metadata
