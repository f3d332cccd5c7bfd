"""Everything that training needs to go on, on disk: a kill at any moment loses no more than steps.

`State.save` writes the level for use and the state in an order that leaves something to go on from
whenever it is cut short; `find_state` reads whichever is there, `State.restore` takes it up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

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


class Found(NamedTuple):
    """A state that `State.save` wrote."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    def fill(self, level: Level) -> None:
        """Give a level the state's weights, and its form, before anything is built around it.

        Levels of earlier versions may lack what new ones have.

        Raises:
            UserError: it is of another level.
        """
        prefix = "level."
        own = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        try:
            level.load_state_dict(own)
        except RuntimeError as error:
            raise self.unfit(error) from None

    def unfit(self, error: Exception) -> UserError:
        return UserError(f"{self.path} does not fit this configuration: {error}")


def find_state(folder: Path, config: Config, data: str) -> Found | None:
    """The state to go on from in a level's folder, if there is one.

    Args:
        config: with the level's own settings merged in.
        data: sha256 of the training images.

    Raises:
        UserError: it is damaged, of other images, or of another model.
    """
    path = newest(folder)
    if path is None:
        return None
    try:
        tensors, metadata = read_tensors(path)
    except UserError as error:
        older = folder / checkpoint.PREVIOUS
        hint = f"; an older one is at {older}: rename it to {path.name} to go on from there"
        offered = older.exists() and path != older
        raise UserError(f"{error}{hint if offered else ''}") from None
    if metadata["data"] != data:
        raise UserError(
            f"{path} was trained on other images, or on the same ones reduced by an earlier "
            "version; resume with the same data"
        )
    then = metadata["config"]
    for section in ("model", "flow", "field"):
        now = getattr(config, section)
        table = to_table(rebuilt(type(now), then.get(section, {}), path))
        if table != to_table(now):
            raise UserError(
                f"{path} is a checkpoint of another model: its [{section}] is {table}"
            )
    return Found(path, tensors, metadata)


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

    def restore(self, found: Found) -> tuple[int, float]:
        """Go on from a state whose level is `update`'s; returns the steps and seconds done.

        Raises:
            UserError: it is of another optimiser.
        """
        tensors, metadata = found.tensors, found.metadata
        plugins.warn_if_changed(metadata.get("code", {}), self.code, found.path)
        update = self.update
        try:
            for i, average in enumerate(update.average):
                average.copy_(tensors[f"average.{i}"])
            update.optimizer.load_state_dict(tensors)
        except (RuntimeError, KeyError) as error:
            raise found.unfit(error) from None
        update.skipped = tensors["skipped"].to(update.skipped.device)
        update.skipped[1:] = 0  # in a row: a resumed run may have been given a remedy
        if (self.folder / checkpoint.WEIGHTS).exists():  # else killed before they were written
            self.saved_step = metadata["step"]
        return metadata["step"], metadata["seconds"]
