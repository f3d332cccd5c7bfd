"""How images are coded: what the encoder chooses and a file tells its decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mrcnf.codec import parts
from mrcnf.codec.parts import Rule
from mrcnf.errors import UserError
from mrcnf.flows.solve import FIXED
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow

STEPS = 64
"""Steps of a level's flow unless told otherwise."""
MOST_STEPS = 1024


@dataclass(frozen=True)
class LevelSettings:
    """How one level is coded; checked when it is made, as a file may say anything."""

    steps: int = STEPS
    """Short steps of a continuous flow."""
    spacing: float = 2.0
    """They end at t = (i/steps)^spacing."""
    method: str = "euler"
    """Runge–Kutta method that finds the middle of a step from its ends."""
    sigma: float = 0.02
    """Standard deviation of the steps' noise at the data, in cells of the pixels."""
    growth: float = 0.1
    """What is added to it on the way to the noise, in standardised units."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, MOST_STEPS), ("spacing", 0.1, 10), ("sigma", 1e-6, 1), ("growth", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            number = isinstance(value, int if name == "steps" else (int, float))
            if not number or isinstance(value, bool) or not low <= value <= high:
                raise UserError(f"codec {name} must be from {low} to {high}, got {value!r}")
        if self.method not in FIXED:
            raise UserError(f"codec method {self.method!r}: choose one of {', '.join(FIXED)}")


@dataclass(frozen=True)
class Settings:
    """How images are coded by all levels."""

    levels: Mapping[int, LevelSettings]
    """By resolution."""
    bits: int
    """A cell is cut into 2^bits sub-cells."""
    rule: Rule | None = None
    """How images are cut; None: they are whole."""
    portable: bool = False
    """Networks are computed so that all machines get the same (`portable`)."""

    LEAST, MOST = 4, 24

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not self.LEAST <= self.bits <= self.MOST:
            raise UserError(f"codec bits must be from {self.LEAST} to {self.MOST}")
        if not isinstance(self.portable, bool):
            raise UserError(f"codec portable must be true or false, got {self.portable!r}")

    def table(self) -> dict[str, Any]:
        """As plain JSON."""
        levels = {str(r): asdict(own) for r, own in self.levels.items()}
        table: dict[str, Any] = {"bits": self.bits, "levels": levels}
        if self.rule is not None:
            table[parts.KEY] = self.rule.table()
        return {**table, "portable": True} if self.portable else table

    @classmethod
    def from_table(cls, table: Mapping[str, Any], model: MultiResolutionFlow) -> Settings:
        """The settings that `table` gave.

        Raises:
            UserError: they are none, or not for this model.
            CodingError: their parts are not of such images.
        """
        known = {field.name for field in fields(LevelSettings)}
        levels = table.get("levels")
        if not isinstance(levels, dict) or set(levels) != {str(r) for r in model.resolutions}:
            raise UserError("its settings are not for the levels of this model")
        if not all(isinstance(own, dict) and set(own) == known for own in levels.values()):
            raise UserError("its settings are not those of this version")
        bits = table.get("bits")
        if not isinstance(bits, int):
            raise UserError("its settings say nothing of sub-cells")
        portable = table.get("portable", False)
        if portable is not ("portable" in table):
            raise UserError("its settings are not those of this version")
        rule = Rule.from_table(table, model.multiple)
        own = {int(r): LevelSettings(**own) for r, own in levels.items()}
        return cls(own, bits, rule, portable)


def default(model: MultiResolutionFlow) -> Settings:
    """Those that were found for a model (`tuning`), or, level by level, what suits most.

    Raises:
        UserError: what is kept beside a level's weights are no settings.
    """
    levels = {}
    for level in model:
        if level.coding:
            levels[level.resolution] = _kept(level)
            continue
        # Coarser levels' coefficients are larger, in cells. The base's velocity bends the most, and
        # costs so little that better halves are a bargain.
        levels[level.resolution] = LevelSettings(
            method="midpoint" if level.is_base and level.halvings else "euler",
            sigma=min(0.08, LevelSettings.sigma * 2**level.halvings),
        )
    return replace(fitting(levels), rule=Rule.of(model.multiple))


def _kept(level: Level) -> LevelSettings:
    try:
        return LevelSettings(**level.coding)
    except (TypeError, UserError) as error:
        raise UserError(
            f"level {level.resolution}: beside its weights are no settings of the codec ({error}); "
            "run `mrcnf calibrate` again"
        ) from None


def fitting(levels: Mapping[int, LevelSettings]) -> Settings:
    """With sub-cells that are fine enough for the noise (`WIDTH`)."""
    finest = min(own.sigma for own in levels.values())
    bits = math.ceil(math.log2(WIDTH / finest))
    return Settings(levels, min(max(bits, Settings.LEAST), Settings.MOST))


WIDTH = 100
"""Units of the lattice in the narrowest noise's standard deviation w, about: rounding to it costs
0.12/w² bits per step and coefficient."""


def with_steps(settings: Settings, steps: int) -> Settings:
    """The same with another number of steps of the finest level, others in proportion.

    Raises:
        UserError: it is none that a level can have.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise UserError(f"codec steps must be from 1 to {MOST_STEPS}, got {steps}")
    finest = settings.levels[max(settings.levels)].steps
    return replace(
        settings,
        levels={
            r: replace(own, steps=max(1, round(own.steps * steps / finest)))
            for r, own in settings.levels.items()
        },
    )
