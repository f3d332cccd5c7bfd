"""Frequencies of discretised Gaussians as integers: the same on every machine, for ever.

A standard deviation is written as an index i and means 2^(i/64) units of a lattice. Exponentials
and roots come from `decimal`, whose results the General Decimal Arithmetic Specification fixes
to the last digit, everything else from whole numbers: no floating-point distribution function
is part of the file format.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal, localcontext
from functools import cache

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

PRECISION = 24
"""Frequencies of a table add up to 2^PRECISION, which is what the entropy coder works with."""
OCTAVE = 64
"""Indices by which a standard deviation doubles."""
LOG_2 = 0.6931471805599453
"""Written out, as the last digit of a library's is its own."""
WIDEST = 6 * OCTAVE
"""Standard deviations from 2^6 on are coded in two parts, see `ans.Stack`."""
TAILS = 8
"""Tables end at so many standard deviations."""
ESCAPE = 16
"""Frequency of what is not in a table, 2^-20 of all."""

DIGITS = Context(prec=60)
"""What decimals are computed with."""
_BITS = 128  # of the fixed-point numbers below: the tail of a table is 2^-46


@cache
def reach(index: int) -> int:
    """The largest value in the table of a standard deviation 2^(index/64)."""
    with localcontext(DIGITS):
        return int((TAILS * _std(index)).to_integral_value(ROUND_CEILING))


@cache
def gaussian(index: int) -> Integers:
    """Frequencies of -reach … reach under a Gaussian, its density at the integers.

    Args:
        index: 0 ≤ index < WIDEST, of the standard deviation 2^(index/64).

    Returns:
        (2·reach + 1,), symmetric, each at least 1, of sum 2^PRECISION.

    >>> int(gaussian(0)[reach(0)]) / 2**PRECISION          # 1/√(2π)
    0.3989...
    """
    if not 0 <= index < WIDEST:
        raise ValueError(f"there is no table of index {index}")
    # exp(-g²/2s²) = r^(g²) with r = exp(-1/2s²): the next is the last times r^(2g+1).
    one = 1 << _BITS
    with localcontext(DIGITS):
        ratio = int((Decimal(-1) / (2 * _std(index) ** 2)).exp() * one)
    squared, factor, weight, half = ratio * ratio >> _BITS, ratio, one, []
    for _ in range(reach(index)):
        weight = weight * factor >> _BITS
        factor = factor * squared >> _BITS
        half.append(weight)
    return _frequencies([*reversed(half), one, *half])


def escaping(index: int) -> Integers:
    """`gaussian` with a last symbol for everything beyond the table."""
    table = gaussian(index)
    centre = len(table) // 2
    found = np.append(table, ESCAPE)
    found[centre] -= ESCAPE
    return found


LAPLACES = 104
"""Indices of `laplace`."""


@cache
def laplace(index: int) -> Integers:
    """Frequencies of -reach … reach and, last, of all beyond, under exp(-|value|/2^(index/8 - 4)).

    Args:
        index: 0 ≤ index < LAPLACES.
    """
    one = 1 << _BITS
    with localcontext(DIGITS):
        scale = (Decimal(2).ln() * (index - 32) / 8).exp()
        ratio = int((-1 / scale).exp() * one)
        reach = min(1023, int(14 * scale) + 4)
    half, weight = list[int](), one
    for _ in range(reach):
        weight = weight * ratio >> _BITS
        half.append(weight)
    return _frequencies([*reversed(half), one, *half, one >> 16])


def nearest(std: float) -> int:
    """The index of the standard deviation next to this one, at least 0."""
    with localcontext(DIGITS):
        octaves = Decimal(std).ln() / Decimal(2).ln()
        return max(0, int((OCTAVE * octaves).to_integral_value()))


@cache
def width(index: int) -> float:
    """2^(index/64)."""
    return float(_std(index))


@cache
def logarithm(value: int) -> int:
    """64·log₂(1 + value), rounded."""
    with localcontext(DIGITS):
        return int((OCTAVE * Decimal(1 + value).ln() / Decimal(2).ln()).to_integral_value())


@cache
def truncated(widths: int, bits: int) -> Integers:
    """Frequencies of 2^bits equal parts of [0, 1] under a Gaussian centred there and cut to it.

    Args:
        widths: how many standard deviations that interval is wide.
    """
    parts = 1 << bits
    with localcontext(DIGITS):
        places = (Decimal(widths * (2 * i + 1 - parts)) / (2 * parts) for i in range(parts))
        return _frequencies([int((-(place**2) / 2).exp().scaleb(36)) for place in places])


def rotated(table: Integers, part: int, parts: int) -> tuple[Integers, int]:
    """The table that begins where `part`/`parts` of the mass are passed, and at which symbol."""
    start = int(np.searchsorted(table.cumsum(), part * (1 << PRECISION) // parts))
    return np.roll(table, -start), start


def _frequencies(weights: list[int]) -> Integers:
    """Integers ≥ 1 of sum 2^PRECISION, in proportion; what rounding leaves goes to the middle."""
    total, room = sum(weights), (1 << PRECISION) - len(weights)
    found = np.array([1 + (2 * w * room + total) // (2 * total) for w in weights], dtype=np.int64)
    found[len(found) // 2] += (1 << PRECISION) - int(found.sum())
    return found


def _std(index: int) -> Decimal:
    with localcontext(DIGITS):
        return (Decimal(2).ln() * index / OCTAVE).exp()
