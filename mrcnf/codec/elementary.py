"""Elementary functions in double precision, the same to the last bit wherever they are computed.

They are made of +, -, ×, ÷, √, rounding and tables alone, one operation after another, each of
which IEEE 754 defines; those of libraries differ in their last digits from one processor and
version to the next. The relative error is a few units of the last place.

Nothing overflows: exponentials take arguments beyond ±708 for ±708.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from mrcnf.codec.tables import DIGITS

_LOG_2 = Fraction(DIGITS.ln(Decimal(2)))
_PI = Fraction("3.141592653589793238462643383279502884197169399375105820974944592")
_PARTS = 64
"""Tabulated powers of two in an octave."""
_FURTHEST = 708.0
_LEAST, _MOST = -1022, 1023
"""Exponents of normal numbers."""
_ROOT = 0.7071
"""Mantissas below it, about √½, are doubled."""


def exp(x: Tensor) -> Tensor:
    """e^x."""
    power, rest = _reduced(x)
    return (rest * power).add_(power)


def expm1(x: Tensor) -> Tensor:
    """e^x - 1, also where it is small."""
    power, rest = _reduced(x)
    return (rest * power).add_(power - 1)


def log(x: Tensor) -> Tensor:
    """Natural logarithm: -∞ of 0, not a number below."""
    exponent, rest = _logarithm(x)
    high, low = _logs_of_2()
    return _at_edges(x, exponent * high + (rest + exponent * low))


def log2(x: Tensor) -> Tensor:
    """Logarithm to base 2, exact for powers of two."""
    exponent, rest = _logarithm(x)
    return _at_edges(x, exponent + rest * float(1 / _LOG_2))


def log1p(x: Tensor) -> Tensor:
    """log(1 + x), also where x is small."""
    whole = 1 + x
    step = whole - 1  # what of x is left in the sum; the logarithm is as much too small
    found = log(whole) * (x / step)
    return torch.where((step == 0) | (whole == math.inf), x, found)


def sigmoid(x: Tensor) -> Tensor:
    """1/(1 + e^-x)."""
    return exp(-x).add_(1).reciprocal_()


def silu(x: Tensor) -> Tensor:
    """x·σ(x)."""
    return x / exp(-x).add_(1)


def logit(x: Tensor, eps: float | None = None) -> Tensor:
    """log x/(1 - x)."""
    x = x if eps is None else x.clamp(eps, 1 - eps)
    return log(x / (1 - x))


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + e^βx)/β; without the threshold beyond which libraries take x for it."""
    x = x if beta == 1 else x * beta
    found = x.clamp_min(0) + log1p(exp(-x.abs()))
    return found if beta == 1 else found / beta


def log_sigmoid(x: Tensor) -> Tensor:
    """log σ(x)."""
    return x.clamp_max(0) - log1p(exp(-x.abs()))


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent."""
    fall = expm1(-2 * x.abs())
    return torch.copysign(fall / (fall + 2), x)


def sin(x: Tensor) -> Tensor:
    """Sine, of as many digits as x has beyond its whole turns, up to 2^20 of these."""
    return _turned(x, 0)


def cos(x: Tensor) -> Tensor:
    """Cosine, as `sin`."""
    return _turned(x, 1)


def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent: by products if that is a small whole number, else of x ≥ 0."""
    if exponent == 0:
        return torch.ones_like(x)
    if exponent == 0.5:
        return x.sqrt()
    whole = int(exponent) if abs(exponent) <= 16 else 0
    if whole == exponent and whole:
        found = x
        for _ in range(abs(whole) - 1):
            found = found * x
        return (found.clone() if found is x else found) if whole > 0 else 1 / found
    found = exp(exponent * log(x))
    return torch.where(x == 0, torch.zeros_like(x) if exponent > 0 else 1 / x, found)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent of whole numbers, exact; what no normal number is counts as the nearest."""
    places = exponent.clamp(_LEAST, _MOST).long() - _LEAST
    return _looked_up(_octaves(exponent.device), places)


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """2^(k/64) and e^r - 1 for x = k·log 2/64 + r, k whole and r small."""
    x = x.clamp(-_FURTHEST, _FURTHEST)
    high, low = _steps()
    k = (x * float(_PARTS / _LOG_2)).round_()
    rest = (x - k * high).sub_(k * low)
    series = rest * (1 / 120)
    for coefficient in (1 / 24, 1 / 6, 1 / 2, 1.0):
        series.add_(coefficient).mul_(rest)
    table = _powers(x.device)
    places = k.nan_to_num_(0.0).long().add_(len(table) // 2)
    return _looked_up(table, places), series


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    # Far faster than indexing; laid out as the places are.
    if places.dim() == 4 and places.is_contiguous(memory_format=torch.channels_last):
        places = places.permute(0, 2, 3, 1)
        return table.index_select(0, places.reshape(-1)).view(places.shape).permute(0, 3, 1, 2)
    return table.index_select(0, places.reshape(-1)).view(places.shape)


def _logarithm(x: Tensor) -> tuple[Tensor, Tensor]:
    """k and log m for x = m·2^k, k whole and m from √½ to √2."""
    mantissa, exponent = torch.frexp(x)
    small = mantissa < _ROOT
    mantissa = torch.where(small, 2 * mantissa, mantissa)
    s = (mantissa - 1) / (mantissa + 1)
    z = s * s
    series = z * (2 / 23)
    for odd in range(21, 1, -2):
        series.add_(2 / odd).mul_(z)
    return (exponent - small.to(exponent.dtype)).to(x.dtype), 2 * s + series.mul_(s)


def _at_edges(x: Tensor, found: Tensor) -> Tensor:
    found = torch.where(x > 0, found, math.nan)
    found = torch.where(x == 0, -math.inf, found)
    return torch.where(x == math.inf, math.inf, found)


def _turned(x: Tensor, quarters: int) -> Tensor:
    """sin(x + quarters·π/2)."""
    first, second, third = _quarter_turns()
    k = (x * float(2 / _PI)).round_().nan_to_num_(0.0).clamp_(-(2.0**40), 2.0**40)
    rest = ((x - k * first).sub_(k * second)).sub_(k * third).clamp_(-1, 1)
    z = rest * rest
    quarter = k.long().add_(quarters)
    found = torch.where((quarter & 1).bool(), _cosine(z), _sine(rest, z))
    return torch.where((quarter & 2).bool(), -found, found)


def _sine(x: Tensor, z: Tensor) -> Tensor:
    """Of x from -π/4 to π/4, with z = x²."""
    series = z * (1 / math.factorial(17))
    for odd in range(15, 1, -2):
        series.mul_(-1).add_(1 / math.factorial(odd)).mul_(z)
    return x - series.mul_(x)


def _cosine(z: Tensor) -> Tensor:
    series = z * (1 / math.factorial(16))
    for even in range(14, 0, -2):
        series.mul_(-1).add_(1 / math.factorial(even)).mul_(z)
    return 1 - series


# Constants and tables, from `decimal` and fractions alone.


@cache
def _logs_of_2() -> tuple[float, float]:
    return _split(_LOG_2, 1, 32)  # type: ignore[return-value]


@cache
def _steps() -> tuple[float, float]:
    return _split(_LOG_2 / _PARTS, 1, 42)  # type: ignore[return-value]


@cache
def _quarter_turns() -> tuple[float, float, float]:
    return _split(_PI / 2, 2, 32)  # type: ignore[return-value]


def _split(number: Fraction, parts: int, bits: int) -> tuple[float, ...]:
    """A number as parts of so many bits each, that small whole numbers multiply exactly, and a
    last one."""
    found = []
    for done in range(bits, (parts + 1) * bits, bits):
        part = math.floor(number * 2**done)
        found.append(math.ldexp(part, -done))
        number -= Fraction(part, 2**done)
    return *found, float(number)


@cache
def _octaves(device: torch.device) -> Tensor:
    """2^_LEAST … 2^_MOST."""
    powers = [math.ldexp(1.0, exponent) for exponent in range(_LEAST, _MOST + 1)]
    return torch.tensor(powers, dtype=torch.float64, device=device)


@cache
def _powers(device: torch.device) -> Tensor:
    """2^(k/64), k from -1022·64 to 1022·64."""
    fractions = [
        float(DIGITS.exp(DIGITS.divide(DIGITS.multiply(DIGITS.ln(2), part), _PARTS)))
        for part in range(_PARTS)
    ]
    octaves = _octaves(device)[: -_LEAST * 2]
    table = octaves[:, None] * torch.tensor(fractions, dtype=torch.float64, device=device)
    return torch.cat((table.flatten(), table.new_tensor([math.ldexp(1.0, -_LEAST)])))
