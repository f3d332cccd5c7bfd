"""Bits back along every kind of piece that a flow may be made of."""

import math

import numpy as np
import pytest
import torch
from fields import awake

from mrcnf.codec.ans import Stack
from mrcnf.codec.lattice import Lattice
from mrcnf.codec.steps import Code
from mrcnf.flows.base import Leave, Lift, Step
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.residual_field import ResidualField
from mrcnf.flows.solve import Solver
from mrcnf.flows.tiled import Tiled
from mrcnf.flows.trace import Trace

UNIT = 2.0**-13


class Squeeze(Lift):
    """2×2 positions become channels: (N, C, H, W) to (N, 4C, H/2, W/2)."""

    shrink = 2

    def lift(self, y, rounded):
        return torch.nn.functional.pixel_unshuffle(y, 2)

    def drop(self, z, rounded):
        return torch.nn.functional.pixel_shuffle(z, 2)


class Reverse(Lift):
    """Channels in the opposite order."""

    def lift(self, y, rounded):
        return y.flip(1)

    def drop(self, z, rounded):
        return z.flip(1)


class Mix(Lift):
    """The first half of the channels is added to the second, times a matrix."""

    def lift(self, y, rounded):
        a, b = y.chunk(2, 1)
        return torch.cat((a, b + rounded(0.7 * a.roll(1, 1))), 1)

    def drop(self, z, rounded):
        a, b = z.chunk(2, 1)
        return torch.cat((a, b - rounded(0.7 * a.roll(1, 1))), 1)


class Coupling(Step):
    """z2 = y2·exp(s(y1)) + m(y1), whose diagonal is exact."""

    def __init__(self, kept):
        self.kept = kept

    def _parts(self, a, b):
        mean = a.mean(1, keepdim=True).expand_as(b)
        return 0.4 * torch.tanh(mean), torch.sin(2 * mean)

    def forward(self, y):
        a, b = y[:, : self.kept], y[:, self.kept :]
        log_scale, shift = self._parts(a, b)
        return torch.cat((a, b * log_scale.exp() + shift), 1)

    def backward(self, z):
        a, b = z[:, : self.kept], z[:, self.kept :]
        log_scale, shift = self._parts(a, b)
        return torch.cat((a, (b - shift) * (-log_scale).exp()), 1)

    def log_scale(self, y):
        a, b = y[:, : self.kept], y[:, self.kept :]
        return torch.cat((torch.zeros_like(a), self._parts(a, b)[0]), 1)


def prior(stays):
    mean = 0.3 * stays
    return mean, 0.5 * torch.tanh(stays) - 0.2


COUPLING = [
    Squeeze(), Coupling(2), Mix(), Reverse(), Coupling(1), Leave(2, prior),
    Mix(), Coupling(1), Reverse(), Coupling(1),
]  # fmt: skip


def exact_bits(pieces, y):
    """-log₂ of the density at y, per image and coefficient, of pieces with exact diagonals."""
    total = torch.zeros(len(y), dtype=torch.float64)

    def normal(x, log_std):
        wrong = 0.5 * (x * (-log_std).exp()) ** 2 + log_std + 0.5 * math.log(2 * math.pi)
        return wrong.flatten(1).sum(1)

    dims = y[0].numel()
    for piece in pieces:
        if isinstance(piece, Leave):
            stays, leaves = y[:, : piece.stays], y[:, piece.stays :]
            mean, log_std = piece.prior(stays)
            total += normal(leaves - mean, log_std)
            y = stays
            continue
        total -= piece.log_scale(y).flatten(1).sum(1)
        y = piece.forward(y)
    total += normal(y, torch.zeros_like(y))
    return total / math.log(2) / dims


def drawn(pieces, count, seed=0):
    """Draws (count, 1, 8, 8) from pieces: what is unlikely under a table's tail costs less."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (count, 1, 8, 8)
    for piece in pieces:
        n, c, h, w = shape
        if isinstance(piece, Leave):
            shape = n, piece.stays, h, w
        else:
            shrink = round(piece.shrink)
            shape = n, c * shrink**2, h // shrink, w // shrink
    z = normal(*shape)
    for piece in reversed(pieces):
        if isinstance(piece, Leave):
            mean, log_std = piece.prior(z)
            z = torch.cat((z, mean + log_std.exp() * normal(*mean.shape)), 1)
        else:
            z = piece.backward(z)
    return z


def lattice(channels=1, unit=UNIT):
    zeros = torch.zeros(channels, 1, 1, dtype=torch.int64)
    units = torch.full((1, 1, 1), unit, dtype=torch.float64)
    return Lattice((), zeros, units, cell=100.0, depth=0.0)


def stack(words=150_000):
    return Stack(np.random.default_rng(0).integers(1, 2**32, words, dtype=np.uint32))


def coded_bits(pieces, y, sigma=7 * 64, growth=0.0, dtype=torch.float64):
    """Bits per coefficient that a state costs, down to a unit cell; it must come back."""
    found, code = stack(), Code(lattice(), sigma, growth, dtype)
    state = (y / UNIT).round().long()
    before, words = found.bits(), found.words()
    code.push(found, state, pieces, (7,))
    spent = (found.bits() - before) / state.numel()
    assert torch.equal(code.pop(found, tuple(state.shape), pieces, (7,)), state)
    assert (found.words() == words).all()
    return spent + math.log2(UNIT)


def data(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_a_split_coupling_flow_is_coded_in_what_its_density_says():
    y = drawn(COUPLING, 100)
    expected = exact_bits(COUPLING, y).mean().item()
    assert abs(coded_bits(COUPLING, y) - expected) < 0.01


def test_lifts_cost_nothing_and_leave_no_trace():
    lifts = [Squeeze(), Mix(), Reverse(), Mix()]
    y = drawn(lifts, 4)
    expected = exact_bits(lifts, y).mean().item()
    assert abs(coded_bits(lifts, y) - expected) < 1e-3


def flow(size=0.15, blocks=1):
    torch.manual_seed(0)
    fields = [ResidualField(1, 2, width=4, depth=1) for _ in range(blocks)]
    return awake(ContinuousFlow(fields, "flow"), size)


def drawn_from(made, count):
    """Draws from a flow of 1×4×4 and their conditions."""
    condition = data(count, 2, 4, 4, seed=1)
    y = made.transport(data(count, 1, 4, 4), condition, backwards=True, solver=Solver("rk4", 30))
    return y, condition


def bound_of(made, y, condition):
    found = made.log_prob(
        y, condition, solver=Solver("rk4", steps=30), trace=Trace("exact")
    ).log_prob
    return (-found / math.log(2)).mean().item() / y[0].numel()


@torch.no_grad()
@pytest.mark.parametrize("way", ["bridges", "two blocks", "steps", "tiles", "wild steps"])
def test_a_continuous_flow_is_coded_in_what_its_density_says(way):
    made = flow(0.05, blocks=2) if way == "two blocks" else flow(0.1)
    if way == "tiles":
        made = Tiled(made, 2)
    y, condition = drawn_from(made, 40)
    expected = bound_of(made, y, condition)
    solver = Solver("midpoint", steps=16, spacing=2.0)
    if way == "steps":
        pieces = list(made.steps(condition, solver, trace=Trace("exact")))
    elif way == "wild steps":  # no good scales: still exact, and larger
        pieces = list(made.pieces(condition, Solver("euler", steps=1)))
        assert coded_bits(pieces, y, growth=0.1) > expected + 0.1
        return
    else:
        pieces = list(made.pieces(condition, solver))
    assert abs(coded_bits(pieces, y, growth=0.03) - expected) < 0.06


@torch.no_grad()
def test_more_steps_are_fewer_bits():
    made = flow()
    y, condition = drawn_from(made, 40)
    expected = bound_of(made, y, condition)
    excess = [
        coded_bits(list(made.pieces(condition, Solver("midpoint", n, 2.0))), y, growth=0.03)
        - expected
        for n in (2, 6, 16)
    ]
    assert excess[0] > 10 * excess[1] > 20 * abs(excess[2]) and excess[1] > 0.03


@torch.no_grad()
def test_a_head_that_knows_the_jacobian_saves_bits():
    """Fitted to nothing, the head only has to be followed alike by both sides."""
    made, y, condition = flow(), data(10, 1, 4, 4), data(10, 2, 4, 4, seed=1)
    (field,) = made
    field.near = awake(field.new_near(), 0.2)
    pieces = list(made.pieces(condition, Solver("midpoint", 8, 2.0)))
    coded_bits(pieces, y, growth=0.03)


@torch.no_grad()
def test_networks_in_single_precision_serve():
    made = flow()
    y, condition = drawn_from(made, 40)
    made.float()
    pieces = list(made.pieces(condition.float(), Solver("midpoint", 16, 2.0)))
    single = coded_bits(pieces, y, growth=0.03, dtype=torch.float32)
    pieces = list(made.double().pieces(condition, Solver("midpoint", 16, 2.0)))
    assert abs(single - coded_bits(pieces, y, growth=0.03)) < 0.04
