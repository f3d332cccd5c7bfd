"""What is written down of a level while it trains: log lines, bits/dim on test images, samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mrcnf import runtime, seeds
from mrcnf.data.imagefile import save_image
from mrcnf.errors import TrainingError
from mrcnf.flows.solve import SolverError
from mrcnf.image.grid import enlarge, grid
from mrcnf.image.noise import dequantise, quantise
from mrcnf.measure import evaluate
from mrcnf.model.level import Level
from mrcnf.runs import metrics
from mrcnf.runs.metrics import Logger, Metrics
from mrcnf.runs.settings import TrainConfig
from mrcnf.training.update import Update

SAMPLES = 16
"""Images of a grid of samples."""
SEEN_SIDE = 64
"""Smaller samples are shown enlarged, to sides of so many pixels."""


class Watch:
    """Writes metrics.jsonl and samples, and stops training that has gone wrong for too long.

    Args:
        folder: of the level.
        resolution: of the level, for messages.
        train: how it is trained.
        update: its weights and their average.
        test: uint8 test images (N, C, H, W) for the curve, if there is to be one.
        step, seconds: done already.
        loggers: to be told each line of metrics.jsonl too.
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
        loggers: Sequence[Logger] = (),
    ) -> None:
        self.resolution, self.train, self.update, self.test = resolution, train, update, test
        self.rank, self.world = runtime.rank_and_world()
        self.logged = (step, seconds)  # of the last line
        self.last_failure = ""  # of a solve, for messages
        self.folder, self.loggers = folder, loggers
        self.last: dict[str, float] = {}
        """What was written down last, by name."""

    def begin(self, step: int) -> None:
        """Open the log; lines from beyond a step, of a killed run, are dropped."""
        self.metrics = Metrics(self.folder, self.train.tensorboard, self.loggers)
        self.metrics.rewind(step)
        for row in metrics.read(self.folder):
            self.last |= row

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

    def samples(self, step: int, images: Tensor) -> None:
        """Write what the averaged weights draw from the same noise each time, a grid of images.

        Above the base they stand three by three: the coarse image of one of `images`, what is
        drawn upon it, and the image itself.

        Args:
            images: uint8 (N, C, H, W), on the level's device, at the finest resolution.
        """
        seed = seeds.seed_of(self.train.seed, self.resolution, "samples")
        generator = seeds.generator(seed, images.device)
        try:
            with self.update.averaged() as level, torch.no_grad():
                shown, columns = _drawn(level, images, generator)
        except SolverError as error:
            self.last_failure = str(error)
            return
        zoom = -(-SEEN_SIDE // self.resolution)
        picture = grid(shown, columns=columns, zoom=zoom)
        save_image(self.folder / f"samples-{step:06d}.png", picture)

    def said(self) -> str:
        """The loss, the pace and the test bits as they were written down last."""
        last, said = self.last, []
        if "loss" in last:
            said.append(f"loss {last['loss']:.4f}")
        if "images_per_s" in last:
            said.append(f"{last['images_per_s']:,.0f} images/s")
        if "test_bpd" in last:
            said.append(f"test {last['test_bpd']:.3f} ± {last['test_bpd_stderr']:.3f} bits/dim")
        return ", ".join(said)

    def _write(self, step: int, row: dict[str, float]) -> None:
        self.last |= row
        if self.rank == 0:
            self.metrics.write(step, row)


def _drawn(level: Level, images: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """Images drawn, uint8, with what they are drawn upon, and how many of them make a row."""
    nbits = level.model.nbits
    shape = (len(images), *level.latent_shape(*images.shape[2:]))
    noise = torch.randn(shape, generator=generator, device=images.device, dtype=level.dtype)
    if level.is_base:
        return quantise(level.generate(noise, None), nbits=nbits), 0
    x, _ = dequantise(
        images, nbits=nbits, kind=level.model.pixel_noise, generator=generator, dtype=level.dtype
    )
    _, coarse = level.coefficients(x)
    assert coarse is not None
    drawn = level.pyramid.contain(level.generate(noise, coarse), coarse)
    truth = level.pyramid.coarsen(x, level.halvings)
    three = [quantise(part, nbits=nbits) for part in (enlarge(coarse, 2), drawn, truth)]
    return torch.stack(three, 1).flatten(0, 1), 12
