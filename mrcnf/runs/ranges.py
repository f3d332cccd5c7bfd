"""What a setting may be, said beside it: `rate: Annotated[float, POSITIVE] = 1.0`."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mrcnf import plugins
from mrcnf.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers for which `holds` is true; nan is in none of those below."""

    words: str
    """Completes "must be"."""
    holds: Callable[[float], bool]

    def check(self, name: str, value: float) -> None:
        if not self.holds(value):
            raise UserError(f"{name} must be {self.words}, got {value}")


@dataclass(frozen=True)
class Choice:
    """One of a few words, or, with `own`, the name of a user's own object."""

    words: tuple[str, ...]
    own: bool = False

    def check(self, name: str, value: str) -> None:
        if value in self.words or (self.own and plugins.is_own(value)):
            return
        close = difflib.get_close_matches(value, self.words, n=1)
        choices = [", ".join(self.words), *([plugins.OWN] if self.own else [])]
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{name} {value!r}: choose one of {', '.join(choices)}{hint}")


FINITE = Range("a finite number", math.isfinite)
POSITIVE = Range("above 0 and finite", lambda v: 0 < v < math.inf)
NOT_NEGATIVE = Range("at least 0 and finite", lambda v: 0 <= v < math.inf)
LIMIT = Range("above 0 (inf: no limit)", lambda v: v > 0)
SHARE = Range("in [0, 1)", lambda v: 0 <= v < 1)
PART = Range("in [0, 1]", lambda v: 0 <= v <= 1)


def at_least(low: int) -> Range:
    """Whole numbers from `low`."""
    return Range(f"at least {low}", lambda v: v >= low)


def check(section: str, settings: Any) -> None:
    """Check a dataclass's annotated fields.

    Raises:
        UserError: one is out of range; the line names it, what it may be and what it is.
    """
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        for rule in getattr(hint, "__metadata__", ()):
            rule.check(f"{section}.{name}", getattr(settings, name))
