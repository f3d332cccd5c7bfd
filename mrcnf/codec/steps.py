"""Bits back along the short steps of a flow, from data to noise and in reverse.

A step takes x to F(x) and has G near its inverse. With σ small against everything that F bends
by, and s the diagonal of its Jacobian (local bits-back of Ho, Lohn & Abbeel 2019, step by step):

    encode:  pop z ~ N(F(x), (σ·s)²) from the stack;  push x under N(G(z), σ²);  go on with z
    decode:  the same in reverse

All of it on a lattice: F(x) and G(z) are rounded to it and need be no more than the same in encoder
and decoder. What is pushed less what is popped is log₂ s per coefficient, and so the change of
volume, but for what G misses x by and what s misses the Jacobian by.

A `Bridge` from x to z over y does without G, and so without solving anything:

    encode:  pop y ~ N(y(x), (σ·√s)²);  z = x + rise(y), rounded;  push y under N(y(z), (σ/√s)²)

Seen from z, noise of y is what it was seen from x times 1/s: it has moved z too.

A step that leaves its first channels as they are codes the others alone. A `Lift` is exact with
its sums rounded to the lattice, and costs nothing. What leaves at a `Leave` is pushed under its
prior. What is left in the end is standard normal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mrcnf.codec.ans import Stack
from mrcnf.codec.lattice import Lattice
from mrcnf.codec.tables import LOG_2, OCTAVE, Integers, width
from mrcnf.flows.base import Bridge, Leave, Lift, Sight, Step

Piece = Step | Bridge | Leave
_Move = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
Shape = tuple[int, int, int, int]

MOST = 2 * OCTAVE
"""A coefficient that a step stretches or shrinks by more than 4 is coded as if by that much."""


class State:
    """A point on the lattice: integers, and the y that networks see, one tensor for all its uses.

    Steps may remember by that tensor what they found out about it.
    """

    def __init__(self, integers: Tensor, lattice: Lattice, dtype: torch.dtype) -> None:
        self.integers = integers
        self.y = lattice.real(integers).to(dtype)


@dataclass(eq=False)
class _Seen:
    """The middle of a bridge as seen from one of its ends, on the lattice."""

    lattice: Lattice
    middle: Tensor
    """Where it should be, integers."""
    scale: Tensor
    """Indices of the standard deviations of what it is off by."""
    amplitude: Tensor
    """√s or 1/√s, that are in these."""
    coupling: Callable[[Tensor], Tensor] | None
    sign: int
    """1 where noise is popped, -1 where it is pushed."""

    @cached_property
    def colours(self) -> list[Tensor]:
        """The places that are coded together: all, or a chequerboard's."""
        everywhere = torch.ones_like(self.scale, dtype=torch.bool)
        if self.coupling is None:
            return [everywhere]
        rows, columns = (torch.arange(side) for side in self.scale.shape[2:])
        black = (rows[:, None] + columns) % 2 == 0
        return [everywhere & black, everywhere & ~black]

    def lean(self, noise: Tensor, colour: int) -> Tensor:
        """By how much the noise of a colour is off its mean, given that of the colour before.

        Noise ε of y moves z, seen from where y looks like (1 - J)·ε. Popping ε with (half of) the
        correlations that this takes away, and pushing the rest with those that are left, changes
        of volume that J makes off its diagonal are in the code.
        """
        if not colour or self.coupling is None:
            return torch.zeros_like(noise)
        known = torch.where(self.colours[0], self.lattice.real(noise) / self.amplitude, 0.0)
        found = self.coupling(known)
        return self.lattice.nearest(self.sign * self.amplitude * found.double())


class Code:
    """Codes a flow's states.

    Args:
        lattice: of the state that the flow begins with; of all states, where any piece is a `Lift`
            or a `Leave`, and then of one unit for all channels.
        sigma: index of σ (`tables`) at the data.
        growth: how much a bridge's σ grows on the way to the noise, in flow units.
        dtype: what networks compute in. (`Lift`s get double precision, which is exact.)
    """

    def __init__(
        self, lattice: Lattice, sigma: int, growth: float, dtype: torch.dtype
    ) -> None:
        self.lattice, self.sigma, self.growth, self.dtype = lattice, sigma, growth, dtype

    def push(
        self, stack: Stack, integers: Tensor, pieces: Sequence[Piece], key: tuple[int, ...]
    ) -> None:
        """Push a state (N, C, H, W), int64.

        Args:
            key: what no other state on this stack is given.
        """
        state = self._state(integers)
        for number, piece in enumerate(pieces):
            if isinstance(piece, Leave):
                state = self._push_leaving(stack, state, piece)
            elif isinstance(piece, Bridge):
                state = self._push_bridge(stack, state, piece, (*key, number))
            elif isinstance(piece, Lift):
                state = self._state(self._on_lattice(piece.lift, state.integers))
            else:
                state = self._push_step(stack, state, piece, (*key, number))
        stack.push_normal(state.integers.numpy(), self._prior(state.integers.shape))

    def pop(
        self, stack: Stack, shape: Shape, pieces: Sequence[Piece], key: tuple[int, ...]
    ) -> Tensor:
        """Pop the state of this shape that `push` pushed."""
        last = shape
        for piece in pieces:
            last = _shape_after(piece, last)
        state = self._state(_tensor(stack.pop_normal(last, self._prior(last))))
        for number, piece in reversed(list(enumerate(pieces))):
            if isinstance(piece, Leave):
                state = self._pop_leaving(stack, state, piece)
            elif isinstance(piece, Bridge):
                state = self._pop_bridge(stack, state, piece, (*key, number))
            elif isinstance(piece, Lift):
                state = self._state(self._on_lattice(piece.drop, state.integers))
            else:
                state = self._pop_step(stack, state, piece, (*key, number))
        return state.integers

    # One piece

    def _push_step(self, stack: Stack, x: State, step: Step, key: tuple[int, ...]) -> State:
        scale, reached = self._ahead(x, step)
        noise = stack.pop_noise(scale, key)
        z = self._state(_join(x, step.kept, reached + _tensor(noise)))
        residual = x.integers[:, step.kept :] - self._behind(z, step)
        stack.push_normal(residual.numpy(), self.sigma)
        return z

    def _pop_step(self, stack: Stack, z: State, step: Step, key: tuple[int, ...]) -> State:
        origin = self._behind(z, step)
        residual = stack.pop_normal(tuple(origin.shape), self.sigma)
        x = self._state(_join(z, step.kept, origin + _tensor(residual)))
        scale, reached = self._ahead(x, step)
        noise = z.integers[:, step.kept :] - reached
        stack.push_noise(noise.numpy(), scale, key)
        return x

    def _ahead(self, x: State, step: Step) -> tuple[Integers, Tensor]:
        """Indices of σ·s and F(x), of the channels that a step changes."""
        stretch = OCTAVE * step.log_scale(x.y)[:, step.kept :].double() / LOG_2
        index = stretch.nan_to_num().round().clamp(-MOST, MOST).long() + self.sigma
        reached = self.lattice.nearest(step.forward(x.y))
        return index.clamp_min(0).numpy(), reached[:, step.kept :]

    def _behind(self, z: State, step: Step) -> Tensor:
        """G(z), of the channels that a step changes."""
        return self.lattice.nearest(step.backward(z.y))[:, step.kept :]

    def _push_bridge(self, stack: Stack, x: State, bridge: Bridge, key: tuple[int, ...]) -> State:
        seen = self._seen(bridge.ahead(x.y), bridge.t, 1)
        noise = torch.zeros_like(x.integers)
        for colour, places in enumerate(seen.colours):
            popped = stack.pop_noise(seen.scale[places].numpy(), (*key, colour))
            noise[places] = _tensor(popped) + seen.lean(noise, colour)[places]
        y = self._state(seen.middle + noise)
        z = self._state(x.integers + self.lattice.nearest(bridge.rise(y.y)))
        seen = self._seen(bridge.behind(z.y), bridge.t, -1)
        noise = y.integers - seen.middle
        for colour, places in reversed(list(enumerate(seen.colours))):
            residual = (noise - seen.lean(noise, colour))[places]
            stack.push_normal(residual.numpy(), seen.scale[places].numpy())
        return z

    def _pop_bridge(self, stack: Stack, z: State, bridge: Bridge, key: tuple[int, ...]) -> State:
        seen = self._seen(bridge.behind(z.y), bridge.t, -1)
        noise = torch.zeros_like(z.integers)
        for colour, places in enumerate(seen.colours):
            scale = seen.scale[places].numpy()
            residual = _tensor(stack.pop_normal(scale.shape, scale))
            noise[places] = residual + seen.lean(noise, colour)[places]
        y = self._state(seen.middle + noise)
        x = self._state(z.integers - self.lattice.nearest(bridge.rise(y.y)))
        seen = self._seen(bridge.ahead(x.y), bridge.t, 1)
        noise = y.integers - seen.middle
        for colour, places in reversed(list(enumerate(seen.colours))):
            popped = (noise - seen.lean(noise, colour))[places]
            stack.push_noise(popped.numpy(), seen.scale[places].numpy(), (*key, colour))
        return x

    def _seen(self, sight: Sight, t: float, sign: int) -> _Seen:
        """What an end of a bridge knows of its middle: 1 from x, -1 from z."""
        limit = MOST * LOG_2 / OCTAVE
        half = sign * sight.half.double().nan_to_num().clamp(-limit, limit)
        scale = self._sigmas(t) + OCTAVE / LOG_2 * half
        return _Seen(
            self.lattice, self.lattice.nearest(sight.y), scale.round().clamp_min(0).long(),
            half.exp(), sight.coupling, sign,
        )  # fmt: skip

    def _sigmas(self, t: float) -> Tensor:
        """Indices of σ, (C, 1, 1) or (1, 1, 1), not rounded."""
        found = width(self.sigma) + self.growth * t / self.lattice.unit
        return OCTAVE * found.log2()

    def _push_leaving(self, stack: Stack, state: State, piece: Leave) -> State:
        stays = self._state(state.integers[:, : piece.stays].contiguous())
        middle, deviation = self._leaving(stays, piece)
        leaves = state.integers[:, piece.stays :]
        stack.push_normal((leaves - middle).numpy(), deviation)
        return stays

    def _pop_leaving(self, stack: Stack, stays: State, piece: Leave) -> State:
        middle, deviation = self._leaving(stays, piece)
        leaves = middle + _tensor(stack.pop_normal(tuple(middle.shape), deviation))
        return self._state(torch.cat((stays.integers, leaves), 1))

    def _leaving(self, stays: State, piece: Leave) -> tuple[Tensor, Integers]:
        mean, log_std = piece.prior(stays.y)
        return self.lattice.nearest(mean), self.lattice.deviations(log_std).numpy()

    def _on_lattice(self, move: _Move, integers: Tensor) -> Tensor:
        unit = self.lattice.unit
        return self.lattice.nearest(
            move(self.lattice.real(integers), lambda sums: (sums / unit).round() * unit)
        )

    def _state(self, integers: Tensor) -> State:
        return State(integers, self.lattice, self.dtype)

    def _prior(self, shape: Sequence[int]) -> Integers:
        index = self.lattice.deviations(torch.zeros(1, 1, 1))
        return index.expand(tuple(shape)).numpy()


def _join(state: State, kept: int, changed: Tensor) -> Tensor:
    return torch.cat((state.integers[:, :kept], changed), 1) if kept else changed


def _shape_after(piece: Piece, shape: Shape) -> Shape:
    n, c, h, w = shape
    if isinstance(piece, Leave):
        return n, piece.stays, h, w
    shrink = piece.shrink if isinstance(piece, Step) else 1
    return n, round(c * shrink**2), round(h / shrink), round(w / shrink)


def _tensor(values: Integers) -> Tensor:
    return torch.from_numpy(values)
