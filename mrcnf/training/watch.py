"""What is written down of a level while it trains: its log lines, and bits/dim on test images."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mrcnf import runtime
from mrcnf.errors import TrainingError
from mrcnf.flows.solve import SolverError
from mrcnf.measure import evaluate
from mrcnf.runs.metrics import Metrics
from mrcnf.runs.settings import TrainConfig
from mrcnf.training.update import Update


class Watch:
    """Writes metrics.jsonl, and stops training that has gone wrong for too long.

    Args:
        folder: of the level.
        resolution: of the level, for messages.
        train: how it is trained.
        update: its weights and their average.
        test: uint8 test images (N, C, H, W) for the curve, if there is to be one.
        step, seconds: done already.
    """

    def __init__(
        self,
        folder: Path,
        resolution: int,
        train: TrainConfig,
        update: Update,
        test: Tensor | None,
        step: int,
        seconds: float,
    ) -> None:
        self.resolution, self.train, self.update, self.test = resolution, train, update, test
        self.rank, self.world = runtime.rank_and_world()
        self.logged = (step, seconds)  # of the last line
        self.last_failure = ""  # of a solve, for messages
        self.folder = folder

    def begin(self, step: int) -> None:
        """Open the log; lines from beyond a step, of a killed run, are dropped."""
        self.metrics = Metrics(self.folder, self.train.tensorboard)
        self.metrics.rewind(step)

    def log(
        self, values: dict[str, float], step: int, seconds: float, learning_rate: float
    ) -> dict[str, float]:
        """Write a step's values, with the pace since the last line; returns the whole line.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        skipped, _, worst = self.update.skipped.tolist()
        if worst >= self.train.max_skipped:
            raise TrainingError(
                f"level {self.resolution}, step {step}: {worst:.0f} steps in a row had a "
                f"non-finite gradient or one above train.skip_above = {self.train.skip_above:g}; "
                "lower train.learning_rate, lengthen train.warmup, or check the images"
                + (f"; the solver said: {self.last_failure}" if self.last_failure else "")
            )
        step_then, seconds_then = self.logged
        images = (step - step_then) * self.train.batch
        row = values | {
            "learning_rate": learning_rate,
            "skipped": skipped,
            "images_per_s": images / max(seconds - seconds_then, 1e-9),
            "seconds": seconds,
        }
        self.logged = (step, seconds)
        self._write(step, row)
        return row

    def test_bits(self, step: int, seconds: float) -> None:
        """Write the bits/dim of the averaged weights on test images.

        A failed solve is noted and decides nothing.
        """
        assert self.test is not None
        row = {"seconds": seconds}
        try:
            with self.update.averaged() as level:
                bits = evaluate.level_bits(level, self.test)
        except SolverError as error:
            if self.world > 1:
                raise  # the other processes wait for this one's share
            self.last_failure = str(error)
            row["test_failed"] = 1.0
        else:
            row["test_bpd"], row["test_bpd_stderr"] = evaluate.mean_and_error(bits, None)
        self._write(step, row)

    def _write(self, step: int, row: dict[str, float]) -> None:
        if self.rank == 0:
            self.metrics.write(step, row)
