"""What a run is told of its data, its training and its evaluation: units, defaults and ranges.

What a model, its fields, solvers and traces are told stands beside those; `config.Config` holds
all of it together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from mrcnf import plugins
from mrcnf.errors import UserError
from mrcnf.runs.ranges import (
    FINITE,
    LIMIT,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    SHARE,
    Choice,
    Range,
    at_least,
    check,
)

OBJECTIVES = ("flow-matching", "likelihood")
"""What training minimises."""
TIMES = ("logit-normal", "mixed", "uniform", "log-uniform", "likelihood")
"""How flow matching draws its times t."""
OPTIMIZERS = ("muon", "adam")
"""What takes the steps."""
SCHEDULES = ("cosine", "linear", "constant")
"""How the learning rate goes on after its rise."""
PRECISIONS = ("float32", "bfloat16")
"""What the networks compute in."""
LOGIT_MEAN, LOGIT_STD = -1.0, 1.2
"""Mean and standard deviation of log t/(1-t) of logit-normal times, unless a run sets others."""
PIXELS = Range("from 1 to 255 grey levels", lambda v: 1 <= v <= 255)
SEED = Range("a whole number within ±10^12", lambda v: abs(v) <= 10**12)
"""Seeds of an evaluation: each batch's is a multiple of it that 64 bits must hold."""


@dataclass(frozen=True)
class DataConfig:
    """Which images."""

    name: str = "photos"
    """photos, cifar10, cifar100, svhn, fashion-mnist, imagenet32, imagenet64, folder:PATH,
    npz:PATH, npy:PATH, or MODULE:OBJECT, a function of your own, which is told its `options`."""
    root: str = ""
    """Folder that holds the published files; empty: $MRCNF_DATA, else ./data."""
    limit: Annotated[int, at_least(0)] = 0
    """Train on the first so many images; 0 uses all. Evaluation has `evaluate.limit`."""
    crop: Annotated[int, at_least(0)] = 0
    """Of folder:PATH: cut each photograph into at most so many squares of the finest level's size,
    at its own resolution; 0: take its central square, averaged to that size."""
    download: bool = False
    """Fetch missing files from their publishers (extra `data`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a data source of your own."""

    def __post_init__(self) -> None:
        check("data", self)
        _check_options("data", self.options, "name", self.name)
        if self.crop and not self.name.startswith("folder:"):
            raise UserError(
                f"data.crop is for a data.name of the form folder:PATH; it is {self.name}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """How one level is trained."""

    objective: Annotated[str, Choice(OBJECTIVES, own=True)] = "flow-matching"
    """flow-matching (no simulation), likelihood (through the ODE), or MODULE:OBJECT, a function of
    your own, which is told its `options`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of an objective of your own."""
    init: str = ""
    """Run whose level of the same resolution supplies the starting weights; empty starts afresh."""
    init_level: Annotated[int, at_least(0)] = 0
    """Resolution of the level of that run, where another one is to supply them: details look much
    the same at all scales. Its networks and axes are taken, units are fitted anew. 0: the same."""
    steps: Annotated[int, at_least(1)] = 4000
    """Optimiser steps."""
    minutes: Annotated[float, NOT_NEGATIVE] = 0.0
    """Train for so many minutes instead of `steps`, the learning rate falling with the time spent;
    0 counts steps. Such a run does not repeat to the bit."""
    batch: Annotated[int, at_least(1)] = 64
    """Images per step, over all processes and micro-batches."""
    micro_batches: Annotated[int, at_least(1)] = 1
    """Pieces that a batch is processed in, to save memory; a multiple of the processes."""
    optimizer: Annotated[str, Choice(OPTIMIZERS)] = "muon"
    """muon (for hidden convolutions, Adam for the rest) or adam (for all)."""
    learning_rate: Annotated[float, POSITIVE] = 4e-3
    """Peak learning rate."""
    beta2: Annotated[float, SHARE] = 0.99
    """Decay per step of Adam's second moment."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.3
    """Shrinking of the weights that Muon trains, per step and unit of learning rate."""
    schedule: Annotated[str, Choice(SCHEDULES)] = "cosine"
    """cosine or linear (both fall to 0 at the last step) or constant, after the warm-up."""
    warmup: Annotated[int, at_least(0)] = 100
    """Steps over which the learning rate rises linearly."""
    ema: Annotated[float, SHARE] = 0.999
    """Decay per step of the averaged weights that are saved for use; 0 saves the last ones."""
    clip: Annotated[float, LIMIT] = 1.0
    """Largest norm of the gradient; larger ones are scaled down to it."""
    skip_above: Annotated[float, LIMIT] = 500.0
    """A step whose gradient norm exceeds this, or is not finite, is skipped and counted."""
    max_skipped: Annotated[int, at_least(1)] = 50
    """Training stops with an error when so many steps in a row are skipped."""
    kinetic: Annotated[float, NOT_NEGATIVE] = 0.01
    """Weight of the kinetic energy (likelihood objective)."""
    frobenius: Annotated[float, NOT_NEGATIVE] = 0.01
    """Weight of the Jacobian's squared Frobenius norm (likelihood objective)."""
    steer: Annotated[float, SHARE] = 0.0
    """Half-width of the end-time jitter, in t (likelihood objective)."""
    times: Annotated[str, Choice(TIMES)] = "logit-normal"
    """Times of flow matching: logit-normal, uniform, log-uniform, mixed (half of either), or
    likelihood (log-uniform, errors weighted as in the evidence lower bound)."""
    times_centre: Annotated[float, FINITE] = LOGIT_MEAN
    """Mean of log t/(1-t) of logit-normal times."""
    times_spread: Annotated[float, POSITIVE] = LOGIT_STD
    """Standard deviation of log t/(1-t) of logit-normal times."""
    flip: bool = True
    """Mirror half of the images."""
    crop: Annotated[int, at_least(0)] = 0
    """Side of random training crops at the finest resolution, in pixels; 0: whole images."""
    attack_share: Annotated[float, PART] = 0.0
    """Share of every micro-batch that is attacked first: its pixels moved so that the objective's
    own loss grows; 0: none."""
    attack_epsilon: Annotated[int, PIXELS] = 2
    """How far those attacks move a pixel, in grey levels."""
    attack_steps: Annotated[int, at_least(1)] = 3
    """Gradients that those attacks take, each for about the time of a step without attacks."""
    precision: Annotated[str, Choice(PRECISIONS)] = "float32"
    """float32, or bfloat16 inside the network (state and trace stay float32)."""
    compile: bool = False
    """Compile the network with torch.compile, which takes a minute first; on a CPU it needs a C++
    compiler."""
    seed: int = 0
    """Of weights, order, noise, times and probes; any whole number."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, …"""
    log_every: Annotated[int, at_least(1)] = 50
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Annotated[int, at_least(1)] = 500
    """Steps between checkpoints."""
    evaluate_every: Annotated[int, at_least(0)] = 0
    """Steps between evaluations of the averaged weights on test images, for a curve of bits/dim in
    metrics.jsonl (`test_bpd`, the level's share); 0: none. Nothing is chosen by it, and its time
    does not count."""
    evaluate_images: Annotated[int, at_least(2)] = 256
    """How many test images those take, the first ones."""
    sample_every: Annotated[int, at_least(0)] = 0
    """Steps between grids of samples of the averaged weights, samples-STEP.png in the level's
    folder, all of the same noise; 0: none. Nothing of the training changes by it, and its time does
    not count."""
    tensorboard: bool = False
    """Write TensorBoard events too (extra `tensorboard`)."""

    def __post_init__(self) -> None:
        check("train", self)
        _check_options("train", self.options, "objective", self.objective)
        if self.batch % self.micro_batches:
            raise UserError(
                f"train.batch {self.batch} must be a multiple of micro_batches {self.micro_batches}"
            )
        if self.init_level and not self.init:
            raise UserError("train.init_level is of train.init; name the run there, too")
        if self.attack_share and not self.attacked:
            raise UserError(
                f"train.attack_share {self.attack_share:g} is no image of a micro-batch of "
                f"{self.batch // self.micro_batches}; raise it, or set it to 0"
            )

    @property
    def attacked(self) -> int:
        """How many images of a micro-batch are attacked."""
        return round(self.attack_share * self.batch / self.micro_batches)


@dataclass(frozen=True)
class EvaluateConfig:
    """How bits per dimension are measured."""

    limit: Annotated[int, at_least(0)] = 1000
    """Test images; 0 takes all."""
    batch: Annotated[int, at_least(1)] = 100
    """Images solved together."""
    draws: Annotated[int, at_least(1)] = 1
    """Dequantisation draws per image."""
    seed: Annotated[int, SEED] = 0
    """Of noise and probes."""
    compile: bool = False
    """Compile the network for evaluation with torch.compile, which takes a minute or two first; on
    a CPU it needs a C++ compiler."""
    tolerance: Annotated[float, at_least(0)] = 0.0
    """Above 0: solve in fewer steps, and add what they are off by, as some images show that are
    solved in all steps, too; with a standard error of about so many bits per dimension."""

    def __post_init__(self) -> None:
        check("evaluate", self)


def _check_options(section: str, options: dict[str, Any], setting: str, name: str) -> None:
    if options and not plugins.is_own(name):
        raise UserError(
            f"{section}.options are for a {section}.{setting} of your own, MODULE:OBJECT; it is "
            f"{name}"
        )
