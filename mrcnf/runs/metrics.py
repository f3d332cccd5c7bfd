"""What training writes down as it goes: metrics.jsonl, TensorBoard's events, a user's loggers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mrcnf import files, plugins
from mrcnf.errors import UserError

FILE = "metrics.jsonl"


class Logger(Protocol):
    """Whatever is to be told what training writes down, such as a run of Weights & Biases."""

    def log(self, values: dict[str, float], step: int, /) -> Any:
        """One line; names are those of metrics.jsonl after the level's: `level-16/loss`."""


def loggers_of(given: Logger | list[Logger] | None) -> list[Logger]:
    """One logger, several, or none, as a list.

    Raises:
        UserError: one has no log(dict, step).
    """
    found = [] if given is None else list(given) if isinstance(given, list) else [given]
    for logger in found:
        name = f"logger {type(logger).__name__}"
        if not callable(getattr(logger, "log", None)):
            raise UserError(f"{name} has no method log(dict, step), by which training reports")
        plugins.check_call(logger.log, f"{name}: log", {}, 0)
    return found


class Metrics:
    """The log of one level.

    Args:
        folder: of the level; its name prefixes TensorBoard's tags.
        tensorboard: write TensorBoard's events too.
        loggers: to be told each line.
    """

    def __init__(
        self, folder: Path, tensorboard: bool = False, loggers: Sequence[Logger] = ()
    ) -> None:
        self.folder, self.board, self.loggers = folder, None, loggers
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "train.tensorboard needs the extra: pip install 'mrcnf[tensorboard]'"
                ) from None
            self.board = SummaryWriter(str(folder))

    def rewind(self, step: int) -> None:
        """Keep the lines up to a step: what came after it will be written again."""
        path = self.folder / FILE
        lines = _lines(path) if step else []
        files.write(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))

    def write(self, step: int, row: dict[str, float]) -> None:
        """Add a line.

        Raises:
            UserError: it cannot be written.
        """
        path = self.folder / FILE
        try:
            with open(path, "a") as file:
                file.write(json.dumps({"step": step} | row) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path}: cannot be written ({reason})") from None
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(f"{self.folder.name}/{name}", value, step)
        for logger in self.loggers:
            logger.log({f"{self.folder.name}/{name}": value for name, value in row.items()}, step)


def read(folder: Path) -> list[dict[str, float]]:
    """The lines of a level's log; none if it has none. A line that a kill cut short is left out."""
    return [json.loads(line) for line in _lines(folder / FILE) if _step_of(line) < math.inf]


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Those lines that have bits/dim on test images."""
    return [row for row in read(folder) if {"test_bpd", "seconds"} <= row.keys()]


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a kill cut short, or damaged
