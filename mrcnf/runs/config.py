"""Configurations: dataclasses with units, TOML in and out, mistakes named.

A configuration has one section per concern (`[data]`, `[model]`, `[field]`, …) and, for what
differs between levels, the same sections again under the level: `[level.16.train]`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.model.settings import FieldConfig, ModelConfig

OBJECTIVES = ("flow-matching", "likelihood")
TIMES = ("logit-normal", "mixed", "uniform", "log-uniform", "likelihood")
LOGIT_MEAN, LOGIT_STD = -1.0, 1.2
"""Defaults of logit-normal times."""
OPTIMIZERS = ("muon", "adam")


@dataclass(frozen=True)
class DataConfig:
    """Which images."""

    name: str = "photos"
    """photos, cifar10, cifar100, svhn, fashion-mnist, imagenet32, imagenet64, folder:PATH or
    npz:PATH."""
    root: str = ""
    """Folder that holds the published files; empty: $MRCNF_DATA, else ./data."""
    limit: int = 0
    """Train on the first so many images; 0 uses all. Evaluation has `evaluate.limit`."""
    download: bool = False
    """Fetch missing files from their publishers (extra `data`)."""


@dataclass(frozen=True)
class TrainConfig:
    """How one level is trained."""

    objective: str = "flow-matching"
    """flow-matching (no simulation) or likelihood (through the ODE)."""
    init: str = ""
    """Run whose level of the same resolution supplies the starting weights; empty starts afresh."""
    steps: int = 4000
    """Optimiser steps."""
    minutes: float = 0.0
    """Train for so many minutes instead of `steps`, the learning rate falling with the time spent;
    0 counts steps. Such a run does not repeat to the bit."""
    batch: int = 64
    """Images per step, over all processes and micro-batches."""
    micro_batches: int = 1
    """Pieces that a batch is processed in, to save memory; a multiple of the processes."""
    optimizer: str = "muon"
    """muon (for hidden convolutions, Adam for the rest) or adam (for all)."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    beta2: float = 0.99
    """Decay per step of Adam's second moment."""
    weight_decay: float = 0.3
    """Shrinking of the weights that Muon trains, per step and unit of learning rate."""
    schedule: str = "cosine"
    """cosine (falls to 0 at the last step) or constant, both after the warm-up."""
    warmup: int = 100
    """Steps over which the learning rate rises linearly."""
    ema: float = 0.999
    """Decay per step of the averaged weights that are saved for use; 0 saves the last ones."""
    clip: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down to it."""
    skip_above: float = 500.0
    """A step whose gradient norm exceeds this, or is not finite, is skipped and counted."""
    max_skipped: int = 50
    """Training stops with an error when so many steps in a row are skipped."""
    kinetic: float = 0.01
    """Weight of the kinetic energy (likelihood objective)."""
    frobenius: float = 0.01
    """Weight of the Jacobian's squared Frobenius norm (likelihood objective)."""
    steer: float = 0.0
    """Half-width of the end-time jitter, in t (likelihood objective)."""
    times: str = "logit-normal"
    """Times of flow matching: logit-normal, uniform, log-uniform, mixed (half of either), or
    likelihood (log-uniform, errors weighted as in the evidence lower bound)."""
    times_centre: float = LOGIT_MEAN
    """Mean of log t/(1-t) of logit-normal times."""
    times_spread: float = LOGIT_STD
    """Standard deviation of log t/(1-t) of logit-normal times."""
    flip: bool = True
    """Mirror half of the images."""
    crop: int = 0
    """Side of random training crops at the finest resolution, in pixels; 0: whole images."""
    precision: str = "float32"
    """float32, or bfloat16 inside the network (state and trace stay float32)."""
    compile: bool = False
    """Compile the network with torch.compile, which takes a minute first; on a CPU it needs a C++
    compiler."""
    seed: int = 0
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, …"""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    evaluate_every: int = 0
    """Steps between evaluations of the averaged weights on test images, for a curve of bits/dim in
    metrics.jsonl (`test_bpd`, the level's share); 0: none. Nothing is chosen by it, and its time
    does not count."""
    evaluate_images: int = 256
    """How many test images those take, the first ones."""
    tensorboard: bool = False
    """Write TensorBoard events too (extra `tensorboard`)."""

    def __post_init__(self) -> None:
        _one_of("train.objective", self.objective, OBJECTIVES)
        _one_of("train.times", self.times, TIMES)
        _one_of("train.optimizer", self.optimizer, OPTIMIZERS)
        _one_of("train.schedule", self.schedule, ("cosine", "constant"))
        _one_of("train.precision", self.precision, ("float32", "bfloat16"))
        for name in ("steps", "batch", "micro_batches", "log_every", "checkpoint_every",
                     "learning_rate", "clip", "skip_above", "max_skipped",
                     "times_spread"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise UserError(f"train.{name} must be positive, got {getattr(self, name)}")
        for name in ("ema", "beta2", "steer"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"train.{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("minutes", "evaluate_every", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} must not be negative, got {getattr(self, name)}")
        if self.evaluate_images < 2:
            raise UserError(f"train.evaluate_images must be at least 2, got {self.evaluate_images}")
        if self.batch % self.micro_batches:
            raise UserError(
                f"train.batch {self.batch} must be a multiple of micro_batches {self.micro_batches}"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """How bits per dimension are measured."""

    limit: int = 1000
    """Test images; 0 takes all."""
    batch: int = 100
    """Images solved together."""
    draws: int = 1
    """Dequantisation draws per image."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluate.{name} must be at least 1, got {getattr(self, name)}")
        if self.limit < 0:
            raise UserError(f"evaluate.limit must not be negative, got {self.limit}")


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    name: str = "run"
    """The run's folder is runs/NAME unless --out says otherwise."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    train_solver: Solver = dataclasses.field(
        default_factory=lambda: Solver(method="bosh3", steps=4, spacing=1.0)
    )
    """Solver of the likelihood objective."""
    train_trace: Trace = dataclasses.field(default_factory=Trace)
    """Trace of the likelihood objective."""
    solver: Solver = dataclasses.field(default_factory=Solver)
    """Solver of evaluation and sampling."""
    trace: Trace = dataclasses.field(default_factory=Trace)
    """Trace of evaluation."""
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    level: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Tables by resolution that replace entries of the sections above."""

    def at_level(self, resolution: int) -> Config:
        """The configuration of one level: its own table merged in, other levels' left out."""
        if resolution not in self.model.resolutions:
            raise UserError(
                f"there is no level {resolution}: model.resolutions is "
                f"{list(self.model.resolutions)}"
            )
        table = to_table(self)
        own = table.pop("level", {}).get(str(resolution), {})
        return from_table(_merge(table, own))


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}; see experiments/ for some") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read configuration {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    table.setdefault("name", path.stem)
    return from_table(override(table, overrides), str(path))


def override(table: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of the table with `section.key=value` entries set; values as in TOML."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"{assignment!r} is not of the form section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word is a string
        for part in reversed(key.lstrip("-").split(".")):
            value = {part: value}
        table = _merge(table, value)
    return table


def from_table(table: dict[str, Any], where: str = "configuration") -> Config:
    """A checked Config from nested tables; unknown or ill-typed keys are UserErrors."""
    config = _build(Config, table, where, "")
    for resolution, own in config.level.items():
        if not str(resolution).isdigit() or int(resolution) not in config.model.resolutions:
            raise UserError(
                f"{where}: [level.{resolution}] is not one of model.resolutions "
                f"{list(config.model.resolutions)}"
            )
        here = f"{where}, [level.{resolution}]"
        if not isinstance(own, dict):
            raise UserError(f"{here} must be a table of sections, got {own!r}")
        if common := {"name", "model", "level"} & set(own):
            raise UserError(f"{here}: {min(common)} is common to all levels; set it above")
        base = {k: v for k, v in to_table(config).items() if k != "level"}
        _build(Config, _merge(base, own), here, "")
    return config


def changed(section: Any, changes: dict[str, Any], name: str) -> Any:
    """A section's dataclass with some entries replaced, checked as in a file."""
    return _build(type(section), to_table(section) | changes, "command line", name)


def to_table(config: Any) -> dict[str, Any]:
    """Nested plain tables, lists and values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_toml(config: Config) -> str:
    """The configuration as TOML, every value spelled out."""
    lines: list[str] = []
    _write(to_table(config), "", lines)
    return "\n".join(lines).strip() + "\n"


def _write(table: dict[str, Any], prefix: str, lines: list[str]) -> None:
    values = {k: v for k, v in table.items() if not isinstance(v, dict)}
    if prefix and values:
        lines += ["", f"[{prefix}]"]
    lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            _write(value, f"{prefix}.{key}" if prefix else key, lines)


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)  # JSON would spell infinity otherwise
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _merge(table: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    merged = dict(table)
    for key, value in other.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _build(cls: Any, table: Any, where: str, section: str) -> Any:
    if not isinstance(table, dict):
        raise UserError(f"{where}: {section} must be a table of settings, got {table!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    values = {}
    for key, value in table.items():
        full = f"{section}.{key}" if section else key
        if key not in known:
            raise UserError(f"{where}: unknown setting {full!r}{_nearest(key, section, known)}")
        if dataclasses.is_dataclass(known[key]):
            values[key] = _build(known[key], value, where, full)
        else:
            values[key] = _checked(value, known[key], f"{where}: {full}")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _nearest(key: str, section: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {section + '.' if section else ''}{close[0]}?"
    if not section:
        for name, kind in known.items():
            if dataclasses.is_dataclass(kind) and key in {f.name for f in dataclasses.fields(kind)}:
                return f"; did you mean {name}.{key}?"
    return f"; known here: {', '.join(known)}"


def _checked(value: Any, kind: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not all(type(v) is int for v in value):
            raise UserError(f"{where} must be a list of whole numbers, got {value!r}")
        return tuple(value)
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a table, got {value!r}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise UserError(f"{where} must be {names.get(kind, kind)}, got {value!r}")
    return value


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{name} {value!r}: choose one of {', '.join(choices)}{hint}")


