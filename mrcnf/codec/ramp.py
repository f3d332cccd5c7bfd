"""How a file begins, before there are bits to be popped.

A block of images at full accuracy pops up to 30 bits per dimension before it has pushed as much.
The first images are coded without any (`plain`), the next ones roughly, with what these have left
on the stack; finer and finer, and soon in blocks that are as large as what there is allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

from mrcnf.codec.ans import Stack, Underflow
from mrcnf.codec.settings import Settings

Found = TypeVar("Found")


class Rung(NamedTuple):
    """An accuracy that blocks are coded with."""

    bits: int
    """Of sub-cells."""
    sigma: float
    """Noise of the steps at the data, in cells of the finest pixels."""
    growth: float
    """Of the noise, in standardised units."""
    share: float
    """Of the steps at full accuracy."""


ROUGH = (Rung(9, 0.08, 0.05, 1), Rung(6, 0.2, 0.05, 1), Rung(4, 0.5, 0.05, 1 / 2))
"""From fine to rough, below full accuracy, which is rung 0."""
PLAIN = len(ROUGH) + 1
"""The rung of images that are coded without the model."""
_NEEDS = (22.0, 17.0, 12.0, 9.0)
"""Bits per dimension that rungs are first expected to pop before they push: not too many."""
_SPARE = 128
"""Bits that stay on the stack."""


def at(settings: Settings, rung: int) -> Settings:
    """The settings of a rung but `PLAIN`."""
    if not rung:
        return settings
    rough = ROUGH[rung - 1]
    finest = max(settings.levels)
    levels = {
        resolution: replace(
            own,
            steps=max(1, round(own.steps * rough.share)),
            # Coarser levels' coefficients are as much larger.
            sigma=max(own.sigma, min(1.0, rough.sigma * finest / resolution)),
            growth=min(own.growth, rough.growth),
        )
        for resolution, own in settings.levels.items()
    }
    return replace(settings, levels=levels, bits=min(rough.bits, settings.bits))


class Ramp:
    """Finds out how many images, and how accurately, the next block can have."""

    def __init__(self) -> None:
        self._needs = list(_NEEDS)

    def push(
        self,
        stack: Stack,
        code: Callable[[Stack, int, int], Found],
        dims: int,
        least: int,
        most: int,
    ) -> tuple[int, int, Found]:
        """Have a block coded, as finely as can be.

        Args:
            code: pushes so many images at some rung; it may be called and the outcome dropped.
            dims: of an image.
            least, most: images of the block; without the model they are as few as can be.

        Returns:
            how many images it has, the rung, and what `code` returned.
        """
        for rung in range(PLAIN):
            while True:
                count = min(most, int((stack.bits() - _SPARE) / (self._needs[rung] * dims)))
                if count < least:
                    break
                trial = stack.copy()
                trial.mark()
                try:
                    found = code(trial, count, rung)
                except Underflow:
                    self._needs[rung] *= 1.25
                    continue
                popped = stack.bits() - 32 * trial.low
                self._needs[rung] = max(self._needs[rung], 1.02 * popped / (count * dims))
                stack.become(trial)
                return count, rung, found
        return least, PLAIN, code(stack, least, PLAIN)
