"""Training one level: one loop, one process per level (or several with torchrun).

Every random number of a step comes from a generator seeded by (seed, level, step, piece of
the batch), so a resumed run, and a run on K processes, continue as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mrcnf import files, plugins, runtime, seeds
from mrcnf.data.datasets import Images
from mrcnf.errors import UserError, out_of_memory
from mrcnf.flows.solve import SolverError
from mrcnf.runs import checkpoint
from mrcnf.runs.config import Config, own_names, to_toml
from mrcnf.runs.metrics import Logger
from mrcnf.training import objectives
from mrcnf.training.batches import Batches
from mrcnf.training.live import Live
from mrcnf.training.optim import Schedule
from mrcnf.training.order import EpochOrder
from mrcnf.training.prepare import prepare_level, standardise
from mrcnf.training.resume import State, find_state, refuse_used
from mrcnf.training.update import Update
from mrcnf.training.watch import SAMPLES, Watch

REORDER_ON = 256
"""Training images that a flow's orders are measured on."""


class Trainer:
    """One level's training: `step` it, `save` it; `run` does both to the end.

    Args:
        config: of the run.
        resolution: of the level.
        images: to train on.
        run: folder of the run; the level's own is made below it.
        resume: go on from the state that the folder holds.
        test: images for the curve of bits/dim, if `train.evaluate_every` asks for one.
        loggers: to be told what is written down.
        pixels: those of `images` on the level's device, where they are shared with other levels.

    Raises:
        UserError: settings, images or the folder do not fit; nothing has been written.
    """

    def __init__(
        self,
        config: Config,
        resolution: int,
        images: Images,
        run: Path,
        resume: bool = False,
        test: Images | None = None,
        *,
        pixels: Tensor | None = None,
        loggers: Sequence[Logger] = (),
    ) -> None:
        config = config.at_level(resolution)
        self.config, self.resolution, self.train = config, resolution, config.train
        self.folder = checkpoint.level_folder(run, resolution)
        self.rank, self.world = runtime.rank_and_world()
        self._check_processes()
        self.device = runtime.choose_device(self.train.device)
        data = runtime.of_first_process(lambda: images.sha256)
        refuse_used(self.folder, resume)
        level = prepare_level(config, resolution, images)
        found = find_state(self.folder, config, data)
        if found is not None:
            found.fill(level)
        elif self.train.init:
            start = self.train.init_level or resolution
            checkpoint.load_weights(self.train.init, level, start)
            if start != resolution:
                standardise(level, config, images, anew=False)
        self.level = level.to(self.device).train()
        if self.train.compile:
            runtime.require_compiler(self.device, "train.compile")
            self.level.compile()
        objective = objectives.Objective(self.level, config)
        self.objective = DistributedDataParallel(objective) if self.world > 1 else objective
        order = EpochOrder(len(images), self.train.batch, self.train.seed)
        pieces = self.train.micro_batches
        self.mine = range(self.rank, pieces, self.world)
        self.batches = Batches(images, order, pieces, self.mine, self.device, pixels)
        objective.try_out(self.batches.take(torch.arange(min(2, len(images)))))
        self.schedule = Schedule(
            self.train.learning_rate, self.train.warmup, self.train.steps, self.train.minutes,
            fall=self.train.schedule,
        )  # fmt: skip
        self.update = Update(self.level, self.train)
        self.state = State(self.folder, config, data, self.update)
        self.step_number, self.seconds = 0, 0.0
        if found is not None:
            self.step_number, self.seconds = self.state.restore(found)
        self.watch = Watch(
            self.folder, resolution, self.train, self.update,
            None if test is None else test.first(self.train.evaluate_images).pixels,
            self.step_number, self.seconds, loggers,
        )  # fmt: skip
        self.copies = plugins.copies(own_names(config))
        self.begun = False

    def begin(self) -> None:
        """Write down what is going to be done, once, and where nothing is left to do, nothing."""
        if self.begun or self.finished:
            return
        self.begun = True
        if self.rank == 0:
            head = f"# trained on images with sha256 {self.state.data}\n"
            files.write(self.folder / checkpoint.CONFIG, head + to_toml(self.config))
            for name, code in self.copies.items():
                files.write(self.folder / name, code)
            self.watch.begin(self.step_number)

    def _check_processes(self) -> None:
        if self.train.micro_batches % self.world:
            raise UserError(
                f"train.micro_batches is {self.train.micro_batches}: make it a multiple of the "
                f"{self.world} processes"
            )
        if self.train.minutes and self.world > 1:
            raise UserError("train.minutes is for one process: each has a clock of its own")

    def run(self, *, progress: bool = True, stop: Callable[[], bool] = lambda: False) -> None:
        """Train to the last step or until `stop()`, and leave a checkpoint."""
        self.begin()
        shown = progress and self.rank == 0
        with Live(f"level {self.resolution}", shown, self.progress) as live:
            while not self.finished and not stop():
                row = self.advance()
                live.show(self.progress, self.said(), row is not None)
        self.save_if_new()

    def said(self) -> str:
        """Where it is, and what was written down last, in a few words."""
        of = "" if self.train.minutes else f"/{self.train.steps}"
        return ", ".join(filter(None, (f"step {self.step_number}{of}", self.watch.said())))

    def advance(self) -> dict[str, float] | None:
        """A step, with the log line, the test bits and the checkpoint when they are due.

        Returns:
            the line; None where none was due.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        started = time.perf_counter()
        metrics, before = self.step(), self.seconds
        self.seconds = before + time.perf_counter() - started
        row = None
        if self._due(self.train.log_every):
            values = {name: float(value) for name, value in metrics.items()}  # waits for the device
            self.seconds = before + time.perf_counter() - started
            row = self.watch.log(values, self.step_number, self.seconds, self.learning_rate)
        if self.watch.test is not None and self._due(self.train.evaluate_every):
            self.watch.test_bits(self.step_number, self.seconds)
        if self.rank == 0 and self._due(self.train.sample_every):
            self.watch.samples(self.step_number, self._shown())
        if self._due(self.train.checkpoint_every):
            self.save()
        return row

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; returns detached scalars on the device."""
        self.begin()
        if self._reorders():
            self._reorder()
        self.update.optimizer.zero_grad()
        losses = self._gradients()
        norm = self.update.apply(self.step_number, self.learning_rate)
        self.step_number += 1
        return losses | {"gradient_norm": norm}

    def _reorders(self) -> bool:
        """Whether orders of the flow are to be measured before this step."""
        due = self.step_number % self.config.flow.reorder_every == 0
        return self.level.flow.reorders and due and self.progress < 0.5

    def _reorder(self) -> None:
        seed = seeds.seed_of(self.train.seed, self.resolution, f"{self.step_number}/order")
        generator = seeds.generator(seed, self.device)
        count = len(self.batches.images)
        chosen = torch.randint(count, (REORDER_ON,), generator=generator, device=self.device)
        images = self.batches.take(chosen)
        _, x, _ = objectives.seen(images, self.train, self.level.model, generator)
        self.level.reorder(x)

    def _shown(self) -> Tensor:
        """The training images that samples are drawn upon, the same ones each time."""
        seed = seeds.seed_of(self.train.seed, self.resolution, "samples")
        order = torch.randperm(len(self.batches.images), generator=seeds.generator(seed))
        return self.batches.take(order[:SAMPLES].to(self.device))

    def _gradients(self) -> dict[str, Tensor]:
        """Leave a batch's gradients in the parameters; returns its loss and the loss's parts."""
        sums: dict[str, Tensor] = {}
        for piece, batch in self.batches.of_step(self.step_number):
            try:
                parts = self._piece(piece, batch)
            except SolverError as error:
                if self.world > 1:
                    raise  # the other processes wait for this one's gradient
                self.watch.last_failure = str(error)
                for parameter in self.update.parameters:  # so that the step is skipped and counted
                    parameter.grad = torch.full_like(parameter, math.nan)
                return sums | {"loss": torch.tensor(math.nan, device=self.device)}
            except (RuntimeError, MemoryError) as error:
                if out_of_memory(error):
                    self.save_if_new()  # nothing has been updated yet
                raise
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value / len(self.mine)
        return sums

    def _piece(self, piece: int, batch: Tensor) -> dict[str, Tensor]:
        """Add the gradients of one piece of the batch."""
        seed = seeds.seed_of(self.train.seed, self.resolution, f"{self.step_number}/{piece}")
        generator = seeds.generator(seed, self.device)
        # The processes exchange gradients once a step.
        wait = piece != self.mine[-1] and isinstance(self.objective, DistributedDataParallel)
        with self.objective.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
            loss, parts = self.objective(batch, generator)
            (loss / len(self.mine)).backward()
        return {"loss": loss.detach(), **parts}

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step_number % every == 0 or self.finished)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.schedule.learning_rate(self.step_number, self.seconds)

    @property
    def progress(self) -> float:
        """How much of the training is done, from 0 to 1."""
        return self.schedule.progress(self.step_number, self.seconds)

    @property
    def steps(self) -> int:
        """Steps in all: an estimate where the clock decides."""
        by_clock = self.train.minutes and self.progress
        return round(self.step_number / self.progress) if by_clock else self.train.steps

    @property
    def finished(self) -> bool:
        return self.progress >= 1

    def save(self) -> None:
        """Write the level for use and the state for resuming (rank 0 only)."""
        if self.rank == 0:
            self.state.save(self.step_number, self.seconds, self.steps)

    def save_if_new(self) -> None:
        """Write a checkpoint unless the last one is of this step."""
        if self.state.saved_step != self.step_number:
            self.save()
