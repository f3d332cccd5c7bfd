"""A stack of bits: what is pushed comes back in reverse, and noise can be popped from it.

`constriction`'s ANS coder (Bamler 2022, arXiv 2201.01741; Duda 2009) over the integer tables of
`tables`. Standard deviations are given as their indices: i means 2^(i/64).

Two things have to be watched. The coder does not tell when it is empty: it would go on and pop
what it makes up, which no decoder could give back (`Underflow`). And the bits that the next pop
uses are those that were pushed last: noise popped under the distribution of the residuals before
it *is* these residuals. Bits-back codes take that badly (the noise of successive steps adds up
instead of averaging out), so the axis of quantiles is rotated, element by element, by an amount
that a hash of the place in the code decides (`Stack.pop_noise`).
"""

from __future__ import annotations

import copy
import math
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrcnf.codec import tables
from mrcnf.codec.tables import OCTAVE, WIDEST, Integers
from mrcnf.errors import UserError

Words = NDArray[np.uint32]

ROTATIONS = 16
"""Starting points of the rotated axis of quantiles."""
_CHUNK = 16  # bits of the largest uniform symbol


class CodingError(Exception):
    """What cannot be coded, or is no code of this coder."""


class Underflow(CodingError):
    """More bits were popped than there are."""


def require() -> ModuleType:
    """The package `constriction`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import constriction
    except ImportError:
        raise UserError(
            "the codec needs the package constriction: pip install 'mrcnf[compress]'"
        ) from None
    return constriction


class Stack:
    """Integers, last in, first out; arrays of any shape go on it as a whole.

    Args:
        words: what is on it, as `words` gave it.

    Raises:
        CodingError: no stack has these words.
    """

    def __init__(self, words: Words) -> None:
        if len(words) < 3 or not words[-1]:
            raise CodingError("a stack has at least three words, and the last is not 0")
        self._coder = require().stream.stack.AnsCoder(np.ascontiguousarray(words, np.uint32))
        self.low = self._below()
        """Low-water mark: so many words, from the bottom, were not touched since it was set."""

    @classmethod
    def deep(cls, bits: int) -> Stack:
        """A stack with so many bits on it, fixed ones that are as good as random."""
        words = (keyed(bits // 32 + 4, 0) >> np.uint64(32)).astype(np.uint32)
        words[-1] |= 1
        return cls(words)

    def copy(self) -> Stack:
        """Another stack of the same contents."""
        twin = copy.copy(self)
        twin._coder = self._coder.clone()
        return twin

    def become(self, other: Stack) -> None:
        """Take over the contents of a copy that was gone on with."""
        self._coder, self.low = other._coder, min(self.low, other.low)

    def words(self) -> Words:
        return self._coder.get_compressed()

    def bits(self) -> float:
        """How much is on the stack; what a push adds to it is -log2 of the probability."""
        below, state = self._coder.pos()
        return 32 * below + math.log2(state)

    def mark(self) -> None:
        """Set the low-water mark to where the stack is now."""
        self.low = self._below()

    def _below(self) -> int:
        # Beside the coder's state, of two words.
        return int(self._coder.pos()[0])

    # Uniform integers

    def push_uniform(self, values: Integers, bits: int) -> None:
        """Push integers from 0 to 2^bits - 1."""
        values = values.ravel()
        for shift in range(0, bits, _CHUNK):
            size = 1 << min(_CHUNK, bits - shift)
            self._push(values >> shift & size - 1, _uniform(size))

    def pop_uniform(self, shape: tuple[int, ...], bits: int) -> Integers:
        values = np.zeros(math.prod(shape), np.int64)
        for shift in reversed(range(0, bits, _CHUNK)):
            size = 1 << min(_CHUNK, bits - shift)
            values |= self._pop(len(values), _uniform(size)) << shift
        return values.reshape(shape)

    # Parts of the unit interval under a Gaussian cut to it

    def push_truncated(self, values: Integers, widths: int, bits: int) -> None:
        """Push parts, of 2^bits, under a Gaussian of `tables.truncated`."""
        low = max(0, bits - _FINEST_PARTS)
        self.push_uniform(values & (1 << low) - 1, low)
        self._push(values.ravel() >> low, _truncated(widths, bits - low))

    def pop_truncated(self, shape: tuple[int, ...], widths: int, bits: int) -> Integers:
        low = max(0, bits - _FINEST_PARTS)
        values = self._pop(math.prod(shape), _truncated(widths, bits - low)) << low
        return values.reshape(shape) | self.pop_uniform(shape, low)

    # Gaussians, of which anything may be pushed

    def push_normal(self, values: Integers, scale: Integers | int) -> None:
        """Push integers under discretised Gaussians of mean 0.

        Args:
            values: of any size: what is beyond a table is escaped.
            scale: the indices of the standard deviations, shaped as the values, or one for all.
        """
        index, low = _parted(scale)
        high = self._push_low(values.ravel(), low)
        for code, places in reversed(_groups(high.size, index)):
            reach, own = tables.reach(code), high[places]
            wild = np.abs(own) > reach
            self.push_uniform(own[wild], 64)  # in two's complement
            self._push(np.where(wild, 2 * reach + 1, own + reach), _escaping(code))

    def pop_normal(self, shape: tuple[int, ...], scale: Integers | int) -> Integers:
        index, low = _parted(scale)
        high = np.empty(math.prod(shape), np.int64)
        for code, places in _groups(high.size, index):
            reach = tables.reach(code)
            own = self._pop(_count(places, high), _escaping(code)) - reach
            wild = own > reach
            own[wild] = self.pop_uniform((int(wild.sum()),), 64)
            high[places] = own
        return self._pop_low(high, low).reshape(shape)

    # Laplace distributions, in whole and rough steps of scale, of which anything may be pushed

    def push_laplace(self, values: Integers, index: Integers) -> None:
        """Push integers under `tables.laplace` of given indices, shaped as the values."""
        values = values.ravel()
        for code, places in reversed(_groups(values.size, index)):
            model, reach = _laplace(code)
            own = values[places]
            wild = np.abs(own) > reach
            self.push_uniform(own[wild], 64)
            self._push(np.where(wild, 2 * reach + 1, own + reach), model)

    def pop_laplace(self, index: Integers) -> Integers:
        values = np.empty(index.size, np.int64)
        for code, places in _groups(values.size, index):
            model, reach = _laplace(code)
            own = self._pop(_count(places, values), model) - reach
            wild = own > reach
            own[wild] = self.pop_uniform((int(wild.sum()),), 64)
            values[places] = own
        return values.reshape(index.shape)

    # Gaussian noise, popped by an encoder and given back by the decoder

    def pop_noise(self, scale: Integers, key: tuple[int, ...]) -> Integers:
        """Pop integers under discretised Gaussians of mean 0 that have not been seen before.

        Args:
            scale: indices of the standard deviations.
            key: what no other call for this stack is given.

        Returns:
            shaped as the scales, none beyond 8 standard deviations and a bit.
        """
        index, low = _parted(scale)
        high, turns = np.empty(scale.size, np.int64), keyed(WIDEST, *key)
        for code, places in _groups(scale.size, index):
            part, shift = _turn(turns[code])
            model, start, size = _rotated(code, part)
            own = (self._pop(_count(places, high), model) + start) % size - size // 2
            high[places] = np.roll(own, shift)
        return self._pop_low(high, low).reshape(scale.shape)

    def push_noise(self, values: Integers, scale: Integers, key: tuple[int, ...]) -> None:
        """Give back what `pop_noise` gave for these scales and this key.

        Raises:
            CodingError: it gave nothing like it.
        """
        index, low = _parted(scale)
        high = self._push_low(values.ravel(), low)
        turns = keyed(WIDEST, *key)
        for code, places in reversed(_groups(scale.size, index)):
            part, shift = _turn(turns[code])
            model, start, size = _rotated(code, part)
            own = np.roll(high[places], -shift) + size // 2
            if own.size and not (own.min() >= 0 and own.max() < size):
                raise CodingError("noise beyond its table")
            self._push((own - start) % size, model)

    # A wide Gaussian is flat over 2^low integers: high parts from a table, low ones uniform.

    def _push_low(self, values: Integers, low: Integers | int) -> Integers:
        """The high parts of values, after their low ones are pushed."""
        high = np.empty_like(values)
        for bits, places in reversed(_groups(values.size, low)):
            moved = values[places] + (1 << bits >> 1)
            self.push_uniform(moved & (1 << bits) - 1, bits)
            high[places] = moved >> bits
        return high

    def _pop_low(self, high: Integers, low: Integers | int) -> Integers:
        values = np.empty_like(high)
        for bits, places in _groups(high.size, low):
            own = high[places]
            values[places] = (own << bits) + self.pop_uniform(own.shape, bits) - (1 << bits >> 1)
        return values

    def _push(self, symbols: Integers, model: Any) -> None:
        if symbols.size:
            self._coder.encode_reverse(symbols.astype(np.int32), model)

    def _pop(self, count: int, model: Any) -> Integers:
        if not count:
            return np.zeros(0, np.int64)
        symbols = self._coder.decode(model, count).astype(np.int64)
        below = self._below()
        if not below:
            raise Underflow("the stack ran out of bits")
        self.low = min(self.low, below)
        return symbols


def keyed(count: int, *key: int) -> NDArray[np.uint64]:
    """`count` fixed numbers of 64 bits for a key: SplitMix64 of a counter (Steele et al. 2014)."""
    seed = 0
    for part in key:
        seed = int(_mix(np.array([seed + part & _ALL], np.uint64))[0])
    return _mix(np.arange(count, dtype=np.uint64) * _GOLDEN + np.uint64(seed))


_ALL = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FINEST_PARTS = 10


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z + _GOLDEN  # arrays wrap around
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


Places = NDArray[np.intp] | slice


def _groups(count: int, codes: Integers | int) -> list[tuple[int, Places]]:
    """Every code with the places that have it, codes ascending."""
    if isinstance(codes, int):
        return [(codes, slice(None))]
    codes = codes.ravel()
    # Sorting 16-bit numbers takes NumPy linear time.
    order = np.argsort(codes.astype(np.uint16), kind="stable")
    bounds = np.flatnonzero(np.diff(codes[order])) + 1
    return [(int(codes[places[0]]), places) for places in np.split(order, bounds) if count]


def _count(places: Places, values: Integers) -> int:
    return len(values) if isinstance(places, slice) else len(places)


def _parted(scale: Integers | int) -> tuple[Integers | int, Integers | int]:
    """Indices with tables, and how many low bits of such Gaussians are as good as uniform."""
    if isinstance(scale, int):
        low = max(0, (scale - WIDEST) // OCTAVE + 1)
        return scale - low * OCTAVE, low
    lows = np.maximum(0, (scale.ravel() - WIDEST) // OCTAVE + 1)
    return scale.ravel() - lows * OCTAVE, lows


def _turn(number: np.uint64) -> tuple[int, int]:
    """A starting point on the axis of quantiles, and by how much elements are shifted."""
    return int(number >> np.uint64(60)), int(number & np.uint64(0xFFFFFFF))


# Models of `constriction`: made once, as making them takes far longer than using them.


def _model(frequencies: Integers) -> Any:
    """The model of exactly these frequencies, each at least 1, of sum 2^24.

    `perfect=False` gives every symbol 1 and deals the remaining 2^24 - n out in proportion: from
    frequencies less 1, whose sum that is, every product is a whole number and nothing is rounded.
    """
    categorical = require().stream.model.Categorical
    return categorical((frequencies - 1).astype(np.float64), perfect=False)


@cache
def _uniform(size: int) -> Any:
    return require().stream.model.Uniform(size)


@cache
def _escaping(index: int) -> Any:
    return _model(tables.escaping(index))


@cache
def _laplace(index: int) -> tuple[Any, int]:
    table = tables.laplace(index)
    return _model(table), (len(table) - 2) // 2


@cache
def _truncated(widths: int, bits: int) -> Any:
    return _model(tables.truncated(widths, bits))


@cache
def _rotated(index: int, part: int) -> tuple[Any, int, int]:
    table, start = tables.rotated(tables.gaussian(index), part, ROTATIONS)
    return _model(table), start, len(table)
