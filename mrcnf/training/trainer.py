"""Training one level: one loop, one process per level (or several with torchrun).

Every random number of a step comes from a generator seeded by (seed, level, step, piece of
the batch), so a resumed run, and a run on K processes, continue as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mrcnf import files, runtime
from mrcnf.data import datasets as data
from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.flows.solve import SolverError
from mrcnf.image.noise import dequantise
from mrcnf.measure import evaluate
from mrcnf.model.level import Level
from mrcnf.model.settings import ModelConfig
from mrcnf.runs import checkpoint
from mrcnf.runs.config import Config, DataConfig, TrainConfig, to_table, to_toml
from mrcnf.runs.metrics import Metrics
from mrcnf.training import objectives
from mrcnf.training.optim import Optimizer, Schedule
from mrcnf.training.order import EpochOrder, seed_of


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


def load_images(settings: DataConfig, model: ModelConfig, split: str) -> Images:
    """The images of a configuration at the model's finest resolution, of the right channels."""
    images = data.load(
        settings.name,
        split,
        root=settings.root,
        resolution=model.finest,
        limit=(settings.limit or None) if split == "train" else None,
        download=settings.download,
    )
    match_model(model, images)
    return images


def train_levels(
    config: Config,
    resolutions: Sequence[int],
    run: Path,
    *,
    resume: bool = False,
    joint: bool = False,
    progress: bool = True,
) -> None:
    """Train levels into a run folder, one after another or a step of each in turn.

    Levels share neither parameters nor gradients, so `joint` gives the same weights.
    SIGTERM and Ctrl-C end it after a checkpoint.
    """
    for resolution in resolutions:  # at once, not when the earlier levels are done
        _refuse_used(checkpoint.level_folder(run, resolution), resume)
    with runtime.processes(config.train.device), runtime.stop_on_signal() as stop:
        images = load_images(config.data, config.model, "train")
        watched = any(config.at_level(r).train.evaluate_every for r in resolutions)
        test = load_images(config.data, config.model, "test") if watched else None
        trainers = (Trainer(config, r, images, run, resume, test) for r in resolutions)
        if joint:
            together = list(trainers)
            total = sum(t.steps - t.step_number for t in together)
            with tqdm(total=total, desc="all levels", unit="step", disable=not progress) as bar:
                while not stop() and (unfinished := [t for t in together if not t.finished]):
                    for trainer in unfinished:
                        trainer.advance()
                        bar.update()
            for trainer in together:
                trainer.save_if_new()
        else:
            for trainer in trainers:
                trainer.run(progress=progress, stop=stop)
                if stop():
                    break
        stopped = stop()
    if stopped:
        raise KeyboardInterrupt


def prepare_level(config: Config, resolution: int, images: Images) -> Level:
    """An untrained level, standardised on the training images, on the CPU."""
    model = match_model(config.model, images)
    generator = torch.Generator().manual_seed(seed_of(config.train.seed, resolution, "weights"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        level = Level(model, resolution, config.field, config.solver, config.trace)
    chosen = torch.randperm(len(images), generator=generator)[:4096]
    x, _ = dequantise(
        images.pixels[chosen], nbits=model.nbits, kind=model.pixel_noise, generator=generator
    )
    level.fit_standardisation(x)
    return level


def match_model(model: ModelConfig, images: Images) -> ModelConfig:
    """The model's configuration with the data's channels; a UserError where they disagree."""
    _, channels, height, width = images.pixels.shape
    if model.channels not in (0, channels):
        raise UserError(
            f"{images.name} has {channels} channel(s) but model.channels is {model.channels}"
        )
    if (height, width) != (model.finest, model.finest):
        raise UserError(
            f"{images.name} images are {height}×{width} but the finest of model.resolutions is "
            f"{model.finest}"
        )
    return dataclasses.replace(model, channels=channels)


class Trainer:
    """One level's training: `step` it, `save` it; `run` does both to the end."""

    def __init__(
        self,
        config: Config,
        resolution: int,
        images: Images,
        run: Path,
        resume: bool = False,
        test: Images | None = None,
    ) -> None:
        config = config.at_level(resolution)
        self.config, self.resolution, self.train = config, resolution, config.train
        self.folder = checkpoint.level_folder(run, resolution)
        self.rank, self.world = runtime.rank_and_world()
        if self.train.micro_batches % self.world:
            raise UserError(
                f"train.micro_batches is {self.train.micro_batches}: make it a multiple of the "
                f"{self.world} processes"
            )
        if self.train.minutes and self.world > 1:
            raise UserError("train.minutes is for one process: each has a clock of its own")
        self.device = runtime.choose_device(self.train.device)
        self.data_hash = images.sha256
        _refuse_used(self.folder, resume)
        self.level = prepare_level(config, resolution, images).to(self.device).train()
        self._check_level()
        # A run killed between the two renames of `save` has only the previous state.
        states = [self.folder / name for name in (checkpoint.STATE, checkpoint.PREVIOUS)]
        found = next((path for path in states if path.exists()), None)
        if self.train.init and found is None:
            checkpoint.load_weights(self.train.init, self.level)
        if self.train.compile:
            runtime.require_compiler(self.device)
            for part in (*self.level.flow.fields, self.level.dequantiser):
                if part is not None:
                    part.compile()
        objective = objectives.Objective(self.level, config)
        self.objective = DistributedDataParallel(objective) if self.world > 1 else objective
        self.images = images.pixels.to(self.device)
        self.test = None if test is None else test.pixels[: self.train.evaluate_images]
        self.parameters = list(self.level.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        hidden = self.level.flow.hidden_weights() if self.train.optimizer == "muon" else []
        self.optimizer = Optimizer(
            self.parameters, hidden, self.train.beta2, self.train.weight_decay
        )
        self.step_number, self.saved_step = 0, -1
        self.seconds = 0.0
        self.last_failure = ""  # of a solve, for messages
        self.logged = (0, 0.0)  # step and seconds of the last line
        # Kept on the device, so that no step waits for it: steps skipped in all, in a row now,
        # and in a row at the worst.
        self.skipped = torch.zeros(3, device=self.device)
        self.schedule = _schedule(self.train)
        self.order = EpochOrder(len(images), self.train.batch, self.train.seed)
        if found is not None:
            self._restore(found)
        if self.rank == 0:
            head = f"# trained on images with sha256 {self.data_hash}\n"
            files.write(self.folder / checkpoint.CONFIG, head + to_toml(self.config))
            self.metrics = Metrics(self.folder, self.train.tensorboard)
            self.metrics.rewind(self.step_number)

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; returns detached scalars on the device."""
        train, pieces = self.train, self.train.micro_batches
        indices = self.order.indices(self.step_number).chunk(pieces)
        self.optimizer.zero_grad()
        mine = range(self.rank, pieces, self.world)
        sums: dict[str, Tensor] = {}
        for piece in mine:
            generator = torch.Generator(self.device).manual_seed(
                seed_of(train.seed, self.resolution, f"{self.step_number}/{piece}")
            )
            batch = self.images[indices[piece].to(self.device)]
            wait = piece != mine[-1] and isinstance(self.objective, DistributedDataParallel)
            try:
                with self.objective.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                    loss, parts = self.objective(batch, generator)
                    (loss / len(mine)).backward()
            except SolverError as error:
                if self.world > 1:
                    raise  # the other processes wait for this one's gradient
                self.last_failure = str(error)
                sums["loss"] = torch.tensor(math.nan, device=self.device)
                for parameter in self.parameters:  # so that the step is skipped and counted
                    parameter.grad = torch.full_like(parameter, math.nan)
                break
            except (RuntimeError, MemoryError) as error:
                if runtime.out_of_memory(error):
                    self.save_if_new()  # nothing has been updated yet
                raise
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0) + value / len(mine)
        norm = self._apply()
        self.step_number += 1
        return sums | {"gradient_norm": norm}

    def _apply(self) -> Tensor:
        """Clip, skip if exploding, update weights and their average; all without waiting."""
        train = self.train
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (train.clip / (norm + 1e-12)).clamp(max=1.0))
        bad = (~norm.isfinite() | (norm > train.skip_above)).float()
        in_a_row = (self.skipped[1] + 1) * bad
        self.skipped = torch.stack(
            (self.skipped[0] + bad, in_a_row, torch.maximum(self.skipped[2], in_a_row))
        )
        self.optimizer.step(self.schedule.learning_rate(self.step_number, self.seconds), bad)
        decay = min(train.ema, (1 + self.step_number) / (10 + self.step_number))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return norm

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

    def advance(self) -> dict[str, float] | None:
        """A step, with the log line and the checkpoint when they are due; returns the line."""
        started = time.perf_counter()
        metrics, before = self.step(), self.seconds
        self.seconds = before + time.perf_counter() - started
        row = None
        if self.step_number % self.train.log_every == 0 or self.finished:
            row = {name: float(value) for name, value in metrics.items()}  # waits for the device
            self.seconds = before + time.perf_counter() - started
            self._log(row)
        every = self.train.evaluate_every
        if every and self.test is not None and (self.step_number % every == 0 or self.finished):
            self._evaluate(self.test)
        if self.step_number % self.train.checkpoint_every == 0 or self.finished:
            self.save()
        return row

    def _evaluate(self, test: Tensor) -> None:
        """Note the bits of the averaged weights on test images; a failed solve decides nothing."""
        row = {"seconds": self.seconds}
        try:
            bits = evaluate.level_bits(self.finished_level(), test)
        except SolverError as error:
            if self.world > 1:
                raise  # the other processes wait for this one's share
            self.last_failure = str(error)
            row["test_failed"] = 1.0
        else:
            row["test_bpd"], row["test_bpd_stderr"] = evaluate.mean_and_error(bits, None)
        if self.rank == 0:
            self.metrics.write(self.step_number, row)

    def run(self, *, progress: bool = True, stop: Callable[[], bool] = lambda: False) -> None:
        """Train to the last step or until `stop()`, and leave a checkpoint."""
        bar = tqdm(
            total=None if self.train.minutes else self.train.steps,
            initial=self.step_number,
            desc=f"level {self.resolution}",
            unit="step",
            disable=not progress or self.rank > 0,
            mininterval=0.5,
            dynamic_ncols=True,
        )
        with bar:
            while not self.finished and not stop():
                row = self.advance()
                bar.update()
                if row is not None:
                    rate, loss = row["images_per_s"], row["loss"]
                    bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
        self.save_if_new()

    def save_if_new(self) -> None:
        """Write a checkpoint unless the last one is of this step."""
        if self.saved_step != self.step_number:
            self.save()

    def finished_level(self) -> Level:
        """The level with its averaged weights, in eval mode, on the training device."""
        level = Level(
            self.level.model, self.resolution, self.config.field, self.config.solver,
            self.config.trace,
        )  # fmt: skip
        level.load_state_dict(self._averaged_state())
        return level.to(self.device).eval()

    def save(self) -> None:
        """Write the level for use and the state for resuming (rank 0 only)."""
        if self.rank > 0:
            return
        tensors = {f"level.{k}": v for k, v in self.level.state_dict().items()}
        tensors |= {f"average.{i}": average for i, average in enumerate(self.average)}
        tensors |= self.optimizer.state_dict()
        tensors["skipped"] = self.skipped
        progress = {"step": self.step_number, "seconds": self.seconds, "data": self.data_hash}
        extra = {
            **progress,
            "steps": self.steps,
            "objective": self.train.objective,
            "data_name": self.config.data.name,
            "parameters": sum(p.numel() for p in self.parameters),
        }
        weights = self._averaged_state()
        state, previous = self.folder / checkpoint.STATE, self.folder / checkpoint.PREVIOUS
        # The state comes last: whoever finds a finished one need not look at the weights. The
        # first one comes first: weights alone are a copy for use, which is not to be resumed.
        first = not state.exists() and not previous.exists()
        if not first:
            checkpoint.save_level(self.folder, self.level, weights, extra)
        if state.exists():
            state.replace(previous)
        checkpoint.write_tensors(state, tensors, {**progress, "config": to_table(self.config)})
        if first:
            checkpoint.save_level(self.folder, self.level, weights, extra)
        self.saved_step = self.step_number

    def _averaged_state(self) -> dict[str, Tensor]:
        state = dict(self.level.state_dict())
        if self.train.ema:
            names = [name for name, _ in self.level.named_parameters()]
            state |= dict(zip(names, self.average, strict=True))
        return state

    def _restore(self, path: Path) -> None:
        try:
            tensors, metadata = checkpoint.read_tensors(path)
        except UserError as error:
            older = self.folder / checkpoint.PREVIOUS
            hint = f"; an older one is at {older}: rename it to {path.name} to go on from there"
            offered = older.exists() and path != older
            raise UserError(f"{error}{hint if offered else ''}") from None
        if metadata["data"] != self.data_hash:
            raise UserError(f"{path} was trained on other images; resume with the same data")
        then, now = metadata["config"], to_table(self.config)
        for section in ("model", "field"):
            if then[section] != now[section]:
                raise UserError(
                    f"{path} is a checkpoint of another model: its [{section}] is {then[section]}"
                )
        try:
            self.level.load_state_dict(
                {k[6:]: v for k, v in tensors.items() if k.startswith("level.")}
            )
            for i, average in enumerate(self.average):
                average.copy_(tensors[f"average.{i}"])
            self.optimizer.load_state_dict(tensors)
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{path} does not fit this configuration: {error}") from None
        self.skipped = tensors["skipped"].to(self.device)
        self.skipped[1:] = 0  # in a row: a resumed run may have been given a remedy
        self.step_number, self.seconds = metadata["step"], metadata["seconds"]
        self.logged = (self.step_number, self.seconds)
        if (self.folder / checkpoint.WEIGHTS).exists():  # else killed before they were written
            self.saved_step = self.step_number

    def _check_level(self) -> None:
        crop, model = self.train.crop, self.level.model
        unit = model.finest // self.resolution * (1 if self.level.is_base else 2)
        unit *= 2 ** (self.config.field.scales - 1)
        if crop < 0 or crop % unit or crop > model.finest:
            raise UserError(
                f"train.crop {crop} must be a multiple of {unit} and at most {model.finest} for "
                f"level {self.resolution}"
            )
        if self.train.objective == "flow-matching" and self.config.field.blocks > 1:
            raise UserError(
                f"level {self.resolution}: flow matching trains one field, but field.blocks is "
                f"{self.config.field.blocks}; set it to 1, or train.objective to likelihood"
            )

    def _log(self, row: dict[str, float]) -> None:
        skipped, _, worst = self.skipped.tolist()
        if worst >= self.train.max_skipped:
            raise TrainingError(
                f"level {self.resolution}, step {self.step_number}: {worst:.0f} steps in a row had "
                f"a non-finite gradient or one above train.skip_above = {self.train.skip_above:g}; "
                "lower train.learning_rate, lengthen train.warmup, or check the images"
                + (f"; the solver said: {self.last_failure}" if self.last_failure else "")
            )
        step, seconds = self.logged
        images = (self.step_number - step) * self.train.batch
        row |= {
            "learning_rate": self.schedule.learning_rate(self.step_number, self.seconds),
            "skipped": skipped,
            "images_per_s": images / max(self.seconds - seconds, 1e-9),
            "seconds": self.seconds,
        }
        self.logged = (self.step_number, self.seconds)
        if self.rank == 0:
            self.metrics.write(self.step_number, row)


def _schedule(train: TrainConfig) -> Schedule:
    falls = train.schedule == "cosine"
    return Schedule(train.learning_rate, train.warmup, train.steps, train.minutes, falls)


def _refuse_used(folder: Path, resume: bool) -> None:
    weights = (folder / checkpoint.WEIGHTS).exists()
    state = any((folder / name).exists() for name in (checkpoint.STATE, checkpoint.PREVIOUS))
    if weights and not state:
        raise UserError(
            f"{folder} holds weights for use but no state to resume from; choose another --out "
            "(train.init takes the weights along)"
        )
    if state and not resume:
        raise UserError(
            f"{folder} holds a training run already; add --resume to go on with it, or choose "
            "another --out"
        )
