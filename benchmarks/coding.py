"""Lossless coding of images at full accuracy, against the same bits back in its published form."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.timing import Work, alternate, compare, peak_bytes
from benchmarks.workload import images
from mrcnf import runs
from mrcnf.codec import ans, lattice, settings
from mrcnf.codec.ans import Stack
from mrcnf.codec.blocks import Block, Group, Size
from mrcnf.codec.lane import decoding
from mrcnf.codec.levels import LevelCoder
from mrcnf.codec.pyramid import ExactCoder, Pushed, untold
from mrcnf.codec.settings import Settings
from mrcnf.codec.steps import Piece
from mrcnf.errors import UserError
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.residual_field import ResidualField
from mrcnf.flows.solve import Solver
from mrcnf.flows.tangents import Dual
from mrcnf.flows.trace import Trace
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, ModelConfig

Row = dict[str, object]
MODEL = Path("experiments/models/cifar10")
"""The model to code with; where it is not there, an untrained one of `FIELD`s."""
CONFIG, FIELD = ModelConfig(channels=3), FieldConfig()
PROBES = 8
"""Of the reference, for the diagonal of every step's Jacobian."""
FINER = 0.5
"""Its noise over ours: σ is to be a hundredth of a cell or less where steps are inverted."""
SPACING = 3.0
"""Its steps end at t = (i/steps)^3: nearer to the data they are too long to be inverted."""
ALLOWED = 0.01
"""How far its inverses may be off, in standard deviations of the noise."""


def missing(device: str) -> str:
    """Why there is nothing to be timed on a device; empty if there is."""
    if device != "cpu":
        return "files are written and read on the CPU"
    try:
        ans.require()
    except UserError as error:
        return str(error)
    return ""


class Published(LevelCoder):
    """Codes a level over its flow's steps forwards and back again, the inverse by sweeps."""

    def _pieces(self, y: Tensor, condition: Tensor | None) -> list[Piece]:
        own, found = self.settings, lattice.of_level(self.level, self.bits, even=False)
        sigma = own.sigma * found.cell * float(found.unit.min())
        solver = Solver(own.method, own.steps, own.spacing)
        trace = Trace("hutchinson", PROBES)
        flow = self.level.flow_of(y)
        return list(flow.steps(condition, solver, trace=trace, tolerance=ALLOWED * sigma))


class PublishedCoder(ExactCoder):
    """Codes exact pyramids with `Published` levels, at full accuracy alone."""

    def levels(self, rung: int) -> dict[int, LevelCoder]:
        assert rung == 0
        return {
            level.resolution: Published(
                level, self.settings.levels[level.resolution], self.settings.bits
            )
            for level in reversed(list(self.model))
        }


class Side:
    """One of the two that are compared: its coder, and images that it codes in blocks.

    Args:
        each: images of a block.
    """

    def __init__(self, coder: ExactCoder, found: Tensor, each: int) -> None:
        self.coder, self.blocks = coder, found.long().split(each)
        self.count, self.dims = len(found), found.numel()
        self._pushed: list[tuple[Stack, Pushed]] = []

    def push(self) -> None:
        """Every block on a stack that is deep enough for full accuracy."""
        self._pushed = [self._push(block) for block in self.blocks]

    def pop(self) -> None:
        """The inverse; the stacks stay as they are.

        Raises:
            RuntimeError: other images.
        """
        for block, (stack, pushed) in zip(self.blocks, self._pushed, strict=True):
            (found,) = self.coder.pop(stack.copy(), pushed.blocks, pushed.rungs, untold)
            if not torch.equal(found, block):
                raise RuntimeError("decoded images are not those that were coded")

    def ready(self) -> None:
        """`push`, unless that is done."""
        if not self._pushed:
            self.push()

    def bits_per_dim(self) -> float:
        """Of what was pushed."""
        self.ready()
        spent = [sum(t.spent.values()) for _, pushed in self._pushed for t in pushed.tallies]
        return sum(spent) / self.dims

    def _push(self, block: Tensor) -> tuple[Stack, Pushed]:
        stack, size = Stack.deep(64 * block.numel()), Size(*block.shape[2:])
        group = Group(tuple(range(len(block))), size)

        def gather(own: Block) -> Tensor:
            return block[list(own.members)]

        with torch.no_grad():
            pushed = self.coder.push(stack, [group], gather, untold)
        assert pushed.rungs == {0: [0]}, "not one block at full accuracy"
        return stack, pushed


class Bench:
    """Both sides, made when they are first asked for.

    Args:
        count: images that ours codes in one block; the reference codes the first of them.
    """

    def __init__(self, count: int, quick: bool) -> None:
        self.images, self.quick = count, quick

    def rows(self, work: str, repeats: int) -> list[Row]:
        """`compress` or `decompress`: seconds are for all of our images."""
        ours, theirs, device = self.ours, self.theirs, torch.device("cpu")
        works: dict[str, Work] = {"reference": theirs.push, "ours": ours.push}
        if work == "decompress":
            works = {"reference": theirs.pop, "ours": ours.pop}
        resolutions, laps = self.model.resolutions, repeats + 1
        with self._counted() as counts, decoding(self.model):
            if work == "decompress":
                ours.ready()
                theirs.ready()
                counts.clear()
            seconds = alternate(works, device, repeats)
            passes = {r: counts[self.model.level(r)] / laps / ours.count for r in resolutions}
            before = {r: counts[self.double.level(r)] / laps / theirs.count for r in resolutions}
            bare, factor = self._convolutions(passes)
            bared = alternate({"bare": bare}, device, max(3, repeats))["bare"]
            peak = peak_bytes(works["ours"], device)
            bits = self.bits_per_dim
        scaled = [s * ours.count / theirs.count for s in seconds["reference"]]
        row = compare(scaled, seconds["ours"])
        taken = row["seconds"]
        assert isinstance(taken, float)
        row = {
            "work": work,
            "name": f"all levels, {self._steps} steps, {ours.count} images",
            **row,
            "peak_bytes": peak,
            "images": ours.count,
            "reference_images": theirs.count,
            "megabytes_per_second": ours.dims / 1e6 / taken,
            "nfe": passes,
            "reference_nfe": before,
            "evaluations_per_pixel": self._per_pixel(passes),
            "reference_evaluations_per_pixel": self._per_pixel(before),
            "share_of_convolutions": factor * sorted(bared)[len(bared) // 2] / taken,
            "bits_per_dim": bits,
            "bits_over_reference": bits - theirs.bits_per_dim(),
            "settings": self.settings.table(),
            "reference_settings": {
                **self.published.table(),
                "form": "steps forwards and inverses by sweeps, in float64, one image at a time",
                "diagonal": str(Trace("hutchinson", PROBES)),
                "tolerance_sigmas": ALLOWED,
            },
            "coding_model": self.about,
            "coding_threads": 1,
        }
        return [row]

    @property
    def _steps(self) -> int:
        # With fewer there are steps that sweeps do not invert.
        return 16 if self.quick else 32

    @cached_property
    def model(self) -> MultiResolutionFlow:
        if MODEL.is_dir():
            return runs.checkpoint.load(MODEL)
        return untrained()

    @property
    def about(self) -> str:
        return str(MODEL) if MODEL.is_dir() else "untrained residual fields"

    @cached_property
    def double(self) -> MultiResolutionFlow:
        return copy.deepcopy(self.model).double()

    @cached_property
    def settings(self) -> Settings:
        return replace(
            settings.with_steps(settings.default(self.model), self._steps), rule=None
        )

    @cached_property
    def published(self) -> Settings:
        """On the same lattice, so that the noise of the pixels is the same."""
        levels = {
            r: replace(own, method="midpoint", spacing=SPACING, sigma=FINER * own.sigma, growth=0.0)
            for r, own in self.settings.levels.items()
        }
        return replace(self.settings, levels=levels)

    @cached_property
    def ours(self) -> Side:
        found, _ = images(self.model.config.finest, self.images)
        coder = ExactCoder(self.model, self.settings)
        return Side(coder, found[: self.images], self.images)

    @cached_property
    def theirs(self) -> Side:
        return Side(PublishedCoder(self.double, self.published), self._first, 1)

    @cached_property
    def bits_per_dim(self) -> float:
        """Of ours, of what the reference codes, alone on its stack: with the same noise, too."""
        return Side(self.ours.coder, self._first, 1).bits_per_dim()

    @property
    def _first(self) -> Tensor:
        return self.ours.blocks[0][:1]

    @contextmanager
    def _counted(self) -> Iterator[Counter[Level]]:
        """Within: passes through the networks of both sides' levels, a tangent being one more."""
        counts, hooks = Counter[Level](), []
        for level in (*self.model, *self.double):

            def count(level: Level, _: object, given: tuple[Dual]) -> None:
                (y,) = given
                tangents = 0 if y.tangents is None else len(y.tangents)
                counts[level] += len(y.value) * (1 + tangents)

            for field in _fields(level):
                hooks.append(field.first.register_forward_pre_hook(partial(count, level)))
        try:
            yield counts
        finally:
            for hook in hooks:
                hook.remove()

    def _per_pixel(self, passes: dict[int, float]) -> float:
        """Passes of all levels times the positions they are of, over the image's pixels."""
        finest = self.model.config.finest
        return sum(
            own * math.prod(self.model.level(r).latent_shape(finest, finest)[1:])
            for r, own in passes.items()
        ) / finest**2  # fmt: skip

    def _convolutions(self, passes: dict[int, float]) -> tuple[Work, float]:
        """Bare convolutions, and by what their seconds are less than those of all passes."""
        runs, needed, done = list[tuple[Work, int]](), 0.0, 0.0
        for level in self.model:
            bare = machine.bare(level, self.images, dtype=level.dtype, backward=False)
            flop, each = machine.flop(one_pass(level, self.images)), machine.flop(bare)
            own = flop * passes[level.resolution]
            count = max(1, round(own / each / 16))
            runs.append((bare, count))
            needed, done = needed + own, done + count * each

        def run() -> None:
            for bare, count in runs:
                for _ in range(count):
                    bare()

        return run, needed / done


def one_pass(level: Level, count: int) -> Work:
    """A pass of a level's field, for so many images."""
    field = _fields(level)[0]
    channels, *side = level.latent_shape(level.model.finest, level.model.finest)
    y, t = torch.zeros(count, channels, *side, dtype=level.dtype), torch.tensor(0.5)
    condition = None
    if level.coarse_units is not None:
        condition = torch.zeros(count, level.model.channels, *side, dtype=level.dtype)
    context = field.context(condition)
    return lambda: field.value(t.to(y), y, context)


def untrained() -> MultiResolutionFlow:
    """A model of residual fields with heads for a codec, in units of images, not trained."""
    torch.manual_seed(0)
    model = MultiResolutionFlow([Level(CONFIG, r, FIELD) for r in CONFIG.resolutions])
    x, _ = dequantise(images(CONFIG.finest, 64)[0], generator=torch.Generator().manual_seed(0))
    for level in model:
        level.fit_standardisation(x)
        for field in _fields(level):
            field.near = field.new_near()
    return model.eval().requires_grad_(False)


def _fields(level: Level) -> list[ResidualField]:
    assert isinstance(level.flow, ContinuousFlow)
    return [field for field in level.flow if isinstance(field, ResidualField)]
