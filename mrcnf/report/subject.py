"""A run on its way into a page: opened, measured and drawn from when first asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mrcnf import runtime, seeds
from mrcnf.data.datasets import Images
from mrcnf.data.reduce import average
from mrcnf.errors import UserError
from mrcnf.flows.solve import SolverError
from mrcnf.measure import evaluate
from mrcnf.measure.nearest import nearest
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.report.inline import COLUMN
from mrcnf.runs import checkpoint, config
from mrcnf.runs.extend import finest_config
from mrcnf.runs.images import open_images

TEMPERATURES = (1.0, 0.9, 0.8)
"""Standard deviations of the latent noise that samples are shown of."""
CONVERGENCE = 32
"""Test images that are solved again with twice the steps."""
UPSCALED, DRAWS = 5, 4
"""Test images that are upscaled, and how often each."""
NEIGHBOURS, COMPARED = 5, 6
"""Training images beside each sample, and samples that have them."""

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What may be done for a page."""

    images: int = 256
    """Test images that are measured and written by classical codecs; 0: all."""
    training_images: int = 50_000
    """Training images among which neighbours are looked for, the first ones; 0: all."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N."""
    trust: bool = False
    """Run the code that a run names of its own, if it does."""

    def __post_init__(self) -> None:
        if self.images < 0 or self.images == 1 or self.training_images < 0:
            raise UserError(
                f"{self.images} test and {self.training_images} training images cannot be taken: "
                "give at least 2 test images, and 1 training image, or 0 for all"
            )


@dataclass(frozen=True)
class Enlarged:
    """Test images averaged down to a level's size, and drawn again from there."""

    level: int
    inputs: Tensor
    """uint8 (N, C, h, w)."""
    draws: Tensor
    """uint8 (K, N, C, H, W)."""
    truth: Tensor
    """uint8 (N, C, H, W)."""
    among: int
    """Test images of which these vary most, the first ones."""


class Subject:
    """One run.

    What cannot be had says why: its attribute raises a UserError or a SolverError, at once if it
    did so before.

    Args:
        run: a run folder, with at least one trained level.
        number: its place among the runs of the page, which decides its colour.
        name: what it is called there.
        limits: how much work to do.
        overrides: settings of data, evaluate, solver and trace, `section.key=value`.
        progress: show a bar on stderr while measuring.

    Raises:
        UserError: there is no such run, or no such settings.
    """

    def __init__(
        self,
        run: Path,
        number: int = 0,
        name: str = "",
        limits: Limits | None = None,
        overrides: Sequence[str] = (),
        progress: bool = False,
    ) -> None:
        self.run, self.number, self.name = Path(run), number, name or Path(run).resolve().name
        self.limits, self.overrides = limits or Limits(), tuple(overrides)
        evaluate.set_solvers((), config.override({}, overrides))
        self.levels = checkpoint.describe(run)
        self.settings = finest_config(run, overrides)
        self.progress = progress
        self._kept: dict[str, Any] = {}

    def _once(self, what: str, make: Callable[[], T]) -> T:
        if what not in self._kept:
            try:
                self._kept[what] = make()
            except (UserError, SolverError) as error:
                self._kept[what] = error
        kept = self._kept[what]
        if isinstance(kept, Exception):
            raise kept
        return kept

    @property
    def model(self) -> MultiResolutionFlow:
        """The run's model, its solvers and traces as the overrides say."""
        return self._once("model", self._open)

    def _open(self) -> MultiResolutionFlow:
        device = runtime.choose_device(self.limits.device)
        model = checkpoint.load(self.run, device, trust=self.limits.trust)
        evaluate.set_solvers(model, config.override({}, self.overrides))
        return model

    @property
    def test(self) -> Images:
        """All test images."""
        return self._once("test", lambda: self._images(self.settings.data, "test"))

    @property
    def test_data(self) -> str:
        """The digest of the test images: runs of one digest were measured on the same ones."""
        return self._once("digest", lambda: self.test.sha256)

    @property
    def training(self) -> Images:
        """The first so many training images."""
        return self._once("training", self._open_training)

    def _open_training(self) -> Images:
        data = self.settings.data
        most = min((n for n in (data.limit, self.limits.training_images) if n), default=0)
        return self._images(dataclasses.replace(data, limit=most), "train")

    def _images(self, data: config.DataConfig, split: str) -> Images:
        trust = self.limits.trust
        return open_images(data, self.model.config, split, run=self.run, trust=trust)

    @property
    def evaluation(self) -> evaluate.Evaluation:
        """Bits per dimension of test images, with those of every image."""
        return self._once("evaluation", self._evaluate)

    def _evaluate(self) -> evaluate.Evaluation:
        how = dataclasses.asdict(self.settings.evaluate) | {"limit": self.limits.images}
        result = evaluate.evaluate(self.model, self.test, **how, progress=self.progress)
        if any(level.flow.solved for level in self.model):
            result.convergence = evaluate.convergence(
                self.model, self.test, limit=min(CONVERGENCE, self.limits.images or CONVERGENCE),
                batch=how["batch"], seed=how["seed"], refinements=1,
            )  # fmt: skip
        return result

    @property
    def measured(self) -> Tensor:
        """The test images of `evaluation`, uint8 (N, C, H, W)."""
        return self.test.pixels[: self.evaluation.images]

    @property
    def columns(self) -> int:
        """Samples in a row of a page."""
        return max(4, min(10, COLUMN // (self.model.config.finest + 1)))

    def samples(self, temperature: float) -> dict[int, Tensor]:
        """Two rows of samples by resolution, of the same noise at every temperature."""

        def draw() -> dict[int, Tensor]:
            generator = seeds.generator(0, self.model.device)
            drawn = self.model.sample_levels(
                2 * self.columns, temperature=temperature, generator=generator
            )
            return {resolution: images.cpu() for resolution, images in drawn.items()}

        return self._once(f"samples at {temperature}", draw)

    @property
    def upscaled(self) -> list[Enlarged]:
        """The busiest of the test images that are measured, from the size of every lower level."""
        return self._once("upscaled", self._upscale)

    def _upscale(self) -> list[Enlarged]:
        model = self.model
        *lower, finest = model.resolutions
        if not lower:
            raise UserError(f"the model has the level {finest} alone, nothing to upscale from")
        among = self.test.pixels[: self.limits.images or None]
        truth = among[busiest(among, UPSCALED)]
        generator, found = seeds.generator(0, model.device), []
        for level in lower:
            inputs = average(truth, level, level)
            draws = [model.upscale(inputs, level, generator=generator).cpu() for _ in range(DRAWS)]
            found.append(Enlarged(level, inputs, torch.stack(draws), truth, len(among)))
        return found

    @property
    def neighbours(self) -> tuple[Tensor, Tensor]:
        """Samples (N, C, H, W) and the training images nearest to them, (N, K, C, H, W)."""
        return self._once("neighbours", self._find_neighbours)

    def _find_neighbours(self) -> tuple[Tensor, Tensor]:
        among = self.training.pixels
        drawn = self.samples(1.0)[self.model.config.finest][:COMPARED]
        return drawn, among[nearest(drawn, among, min(NEIGHBOURS, len(among)))]


def busiest(images: Tensor, count: int) -> Tensor:
    """Which images vary most, (count,): there is something to see in them."""
    return images.double().flatten(1).std(1).argsort(descending=True, stable=True)[:count]
