"""Configurations: TOML in and out, mistakes named.

A configuration has one section per concern (`[data]`, `[model]`, `[field]`, …) and, for what
differs between levels, the same sections again under the level: `[level.16.train]`. The settings
of each stand in the dataclass of its section.
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

from mrcnf import plugins
from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.model.settings import FieldConfig, FlowConfig, ModelConfig
from mrcnf.runs.settings import (
    DataConfig,
    EvaluateConfig,
    TrainConfig,
)

_WITH_OPTIONS = {"data": "name", "flow": "kind", "field": "kind", "train": "objective"}
"""Sections that can name an object of the user's own, and the settings that do."""


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    name: str = "run"
    """The run's folder is runs/NAME unless --out says otherwise."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)
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

    def __post_init__(self) -> None:
        if not self.name.strip(". ") or "/" in self.name:
            raise UserError(f"name {self.name!r} names no folder; choose another")

    def at_level(self, resolution: int) -> Config:
        """The configuration of one level: its own table merged in, other levels' left out.

        Raises:
            UserError: the model has no such level.
        """
        if resolution not in self.model.resolutions:
            raise UserError(
                f"there is no level {resolution}: model.resolutions is "
                f"{list(self.model.resolutions)}"
            )
        table = to_table(self)
        own = table.pop("level", {}).get(str(resolution), {})
        return from_table(_merge(table, own))


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides.

    Raises:
        UserError: no such file, not TOML, or a mistake in it or in an override.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}; see experiments/ for some") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read configuration {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    table.setdefault("name", path.stem)
    return from_table(override(table, overrides), str(path))


def override(table: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of the table with `section.key=value` entries set; values as in TOML.

    With a name of another object (`data.name`, `field.kind`, …), the options of the last one go,
    and with one of no folder `data.crop`.

    Raises:
        UserError: an assignment without "=".
    """
    given: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"{assignment!r} is not of the form section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text  # a bare word is a string
        for part in reversed(key.lstrip("-").split(".")):
            value = {part: value}
        given = _merge(given, value)
    changed = _merge(table, given)
    for section, key in _WITH_OPTIONS.items():
        old, new = table.get(section), given.get(section)
        if not (isinstance(old, dict) and isinstance(new, dict)) or "options" not in old:
            continue
        if new.get(key, old.get(key)) != old.get(key):
            changed[section]["options"] = new.get("options", {})
    match given.get("data"):
        case {"name": str(name), **others} if not name.startswith("folder:"):
            if "crop" not in others:
                changed["data"].pop("crop", None)
    return changed


def from_table(table: dict[str, Any], where: str = "configuration") -> Config:
    """A checked Config from nested tables.

    Args:
        table: as tomllib reads it; what it lacks has its default.
        where: it is from, for messages.

    Raises:
        UserError: an unknown setting, one of the wrong type, or out of its range.
    """
    config = _build(Config, table, where, "")
    for resolution, own in config.level.items():
        if resolution not in map(str, config.model.resolutions):
            raise UserError(
                f"{where}: [level.{resolution}] is not one of model.resolutions "
                f"{list(config.model.resolutions)}"
            )
        here = f"{where}, [level.{resolution}]"
        if not isinstance(own, dict):
            raise UserError(f"{here} must be a table of sections, got {own!r}")
        if common := {"name", "data", "model", "level"} & set(own):
            raise UserError(f"{here}: {min(common)} is common to all levels; set it above")
        base = {k: v for k, v in to_table(config).items() if k != "level"}
        _build(Config, _merge(base, own), here, "")
    return config


def changed(section: Any, changes: dict[str, Any], name: str) -> Any:
    """A section's dataclass with some entries replaced, checked as in a file.

    Raises:
        UserError: an unknown setting, one of the wrong type, or out of its range.
    """
    return _build(type(section), to_table(section) | changes, "command line", name)


def to_table(config: Any) -> dict[str, Any]:
    """Nested plain tables, lists and values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def to_toml(config: Config) -> str:
    """The configuration as TOML, every value spelled out."""
    import tomli_w  # a machine that writes no runs may lack it

    return tomli_w.dumps(_filled(to_table(config)))


def own_names(config: Config) -> list[str]:
    """What a level's configuration names of a user's own, see `plugins`."""
    names = (getattr(getattr(config, section), key) for section, key in _WITH_OPTIONS.items())
    return [name for name in names if plugins.is_own(name)]


def _filled(table: dict[str, Any]) -> dict[str, Any]:
    """A table without the empty ones in it."""
    whole = {k: _filled(v) if isinstance(v, dict) else v for k, v in table.items()}
    return {key: value for key, value in whole.items() if value != {}}


def _merge(table: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    merged = dict(table)
    for key, value in other.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


# cattrs could call these constructors, but silently makes 7 of 7.5 and 1 of true, and its errors
# name neither the value nor the nearest setting: its hooks would be all of what follows.
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
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{where} is too large a number")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise UserError(f"{where} must be {names.get(kind, kind)}, got {value!r}")
    return value
