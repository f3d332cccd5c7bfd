"""How near the codec's short steps come to local bits back with the Jacobian of the whole flow.

    python experiments/codec_oracle.py experiments/models/cifar10 cifar10 --root DIR \\
        --limit 32 --steps 16 32 64

The base level alone, on test images averaged to its size, every method on the same dequantised
points: the model's density, from the Jacobian of the whole flow in fine steps; what local bits
back (Ho, Lohn & Abbeel 2019, arXiv 1905.08500) would take with that Jacobian, in double precision
from its formula, the mean over draws of its noise, σ as given; and what the codec takes on a stack
that is deep enough, decoded and compared. Excess is over the density, paired by image.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import mrcnf
from mrcnf import seeds
from mrcnf.codec import lifting, settings
from mrcnf.codec.ans import Stack
from mrcnf.codec.lane import decoding
from mrcnf.codec.levels import LevelCoder
from mrcnf.errors import UserError
from mrcnf.flows.base import log_normal
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.solve import State, runge_kutta
from mrcnf.flows.velocity import Conditioned
from mrcnf.model.level import Level

Rate = Callable[[Conditioned, Tensor, State], State]
CLOSE = 1e-4
"""How far f⁻¹ may be off, in standard deviations of the noise."""
MOST = 200
DENSITY = "the density, the whole Jacobian's determinant"


class Map:
    """The f of a flow in so many steps of rk4, short at both ends, where fields change fast.

    In double precision; its Jacobian is found in single precision, many times as fast.
    """

    def __init__(self, flow: ContinuousFlow, steps: int) -> None:
        self.double, self.single = copy.deepcopy(flow).double(), copy.deepcopy(flow).float()
        s = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        self.times = s**2 / (s**2 + (1 - s) ** 2)

    def __call__(self, y: Tensor) -> Tensor:
        """f(y), y (N, C, H, W)."""

        def rate(velocity: Conditioned, t: Tensor, state: State) -> State:
            return (velocity(t, *state),)

        (z,) = self._through(self.double, rate, (y,))
        return z

    def jacobian(self, y: Tensor) -> Tensor:
        """∂f/∂y (D, D) at one y (1, C, H, W)."""
        dims = y.numel()
        tangents = torch.eye(dims).reshape(dims, *y.shape)

        def rate(velocity: Conditioned, t: Tensor, state: State) -> State:
            return velocity.push(t, *state)

        _, pushed = self._through(self.single, rate, (y.float(), tangents))
        return pushed.reshape(dims, dims).T.to(y)

    def _through(self, flow: ContinuousFlow, rate: Rate, state: State) -> State:
        for field in flow:
            dynamics = partial(rate, Conditioned(field, None))
            for t, h in zip(self.times[:-1], self.times.diff(), strict=True):
                state = runge_kutta("rk4", dynamics, t.to(state[0]), h.to(state[0]), state)
        return state


def density(reached: Tensor, jacobian: Tensor) -> float:
    """-log p of one y in nats, from f(y) and its Jacobian there."""
    return float(-log_normal(reached) - torch.linalg.slogdet(jacobian).logabsdet)


def dense(
    f: Map, y: Tensor, sigma: Tensor, noise: Tensor, reached: Tensor, jacobian: Tensor
) -> Tensor:
    """Nats of local bits back, for one y and each draw of the noise.

    z ~ N(f(y), J·S²·Jᵀ) is popped, y pushed under N(f⁻¹(z), S²), z under the base normal:

        -log N(z; 0, I) - log|det J| + |S⁻¹·(y - f⁻¹(z))|²/2 - |e|²/2,    z = f(y) + J·S·e

    Args:
        y: (1, C, H, W), double.
        sigma: the diagonal of S, broadcast against y.
        noise: (K, C, H, W), the e.
        reached, jacobian: f(y) and J.
    """
    inverse, log_det = torch.linalg.inv(jacobian), torch.linalg.slogdet(jacobian).logabsdet
    z = reached + ((sigma * noise).flatten(1) @ jacobian.T).reshape(noise.shape)
    found = y + sigma * noise  # f⁻¹(z), were f linear
    for _ in range(MOST):
        off = ((z - f(found)).flatten(1) @ inverse.T).reshape(noise.shape)
        found = found + off
        if float((off / sigma).abs().max()) < CLOSE:
            break
    else:
        raise RuntimeError("the flow is not inverted at so much noise; take a smaller --sigma")
    missed = ((y - found) / sigma).square().flatten(1).sum(1)
    return -log_normal(z) - log_det + (missed - noise.square().flatten(1).sum(1)) / 2


class Points:
    """Dequantised images of a base level: integers that it codes, and y in flow units.

    Args:
        images: uint8 (N, C, H, W), of the finest size.
    """

    def __init__(self, level: Level, own: settings.Settings, images: Tensor) -> None:
        self.coder = LevelCoder(level, own.levels[level.resolution], own.bits)
        generator = seeds.generator(0)
        noise = torch.randint(0, 1 << own.bits, images.shape, generator=generator)
        self.values = (images.long() << own.bits) + noise
        for _ in range(level.halvings):
            _, self.values = lifting.sums(self.values)
        lattice = self.coder.lattice
        self.y = lattice.real(lattice.enter(self.values))
        self.dims = self.y[0].numel()
        std = level.units.std.double().log2().expand(self.y.shape[1:])
        self.base = self.dims * level.model.nbits + float(std.sum())
        """Bits of an image, less those of y's density."""

    def sigma(self, cells: float) -> Tensor:
        """The noise in flow units (C, 1, 1), from cells of the finest pixels."""
        return cells * self.coder.lattice.cell * self.coder.lattice.unit

    def code(self, place: int, coder: LevelCoder) -> tuple[Stack, float]:
        """A deep stack with an image on it, and the bits that it took."""
        words = np.random.default_rng(place).integers(1, 2**32, 64 + 2 * self.dims, dtype=np.uint32)
        stack = Stack(words)
        before = stack.bits() + self.dims * coder.lattice.depth
        coder.push(stack, self.values[place : place + 1], None, (place, 0))
        return stack, stack.bits() - before

    def comes_back(self, place: int, coder: LevelCoder, stack: Stack) -> bool:
        values = self.values[place : place + 1]
        n, c, h, w = values.shape
        return torch.equal(coder.pop(stack, (n, c, h, w), None, (place, 0)), values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of a trained model")
    parser.add_argument("data", help="test images, by name")
    parser.add_argument("--root", default="", help="where published files are")
    parser.add_argument("--limit", type=int, default=32, help="the first so many images")
    parser.add_argument("--steps", type=int, nargs="*", default=[16, 32, 64], help="of the codec")
    parser.add_argument(
        "--sigma", type=float, nargs="*", help="of the oracle, in cells; default: the codec's"
    )
    parser.add_argument("--draws", type=int, default=8, help="of the oracle's noise; even")
    parser.add_argument("--solver-steps", type=int, default=16, help="of rk4, of f")
    options = parser.parse_args()
    model = mrcnf.load(options.run)
    images = mrcnf.data.load(options.data, "test", root=options.root).pixels[: options.limit]
    with decoding(model) as own:
        report(next(iter(own)), settings.default(own), images, options)


def report(
    level: Level, own: settings.Settings, images: Tensor, options: argparse.Namespace
) -> None:
    """Print the table."""
    if not level.is_base or not isinstance(level.flow, ContinuousFlow):
        raise UserError("the oracle is of a base level with a continuous flow")
    points = Points(level, own, images)
    f = Map(level.flow, options.solver_steps)
    sigmas = options.sigma or [own.levels[level.resolution].sigma]
    bits, seconds = dict[str, list[float]](), dict[str, list[float]]()

    def note(name: str, found: float, taken: float) -> None:
        bits.setdefault(name, []).append(found / points.dims)
        seconds.setdefault(name, []).append(taken)

    coders = {}
    for steps in options.steps:
        chosen = settings.with_steps(own, steps)
        coders[steps] = LevelCoder(level, chosen.levels[level.resolution], chosen.bits)
    generator, clock = seeds.generator(1), time.perf_counter
    for i, y in enumerate(points.y.split(1)):
        started = clock()
        reached, jacobian = f(y), f.jacobian(y)
        taken = clock() - started
        note(DENSITY, points.base + density(reached, jacobian) / math.log(2), taken)
        half = (options.draws // 2, *y.shape[1:])
        noise = torch.randn(half, generator=generator, dtype=y.dtype)
        for cells in sigmas:
            started = clock()
            both = torch.cat((noise, -noise))
            nats = float(dense(f, y, points.sigma(cells), both, reached, jacobian).mean())
            name = f"local bits back, the whole Jacobian, σ = {cells:g} cells"
            note(name, points.base + nats / math.log(2), taken + clock() - started)
        for steps, coder in coders.items():
            started = clock()
            stack, spent = points.code(i, coder)
            note(f"the codec, {steps} steps", spent, clock() - started)
            if not points.comes_back(i, coder, stack):
                raise RuntimeError("the codec did not give back what it was given")
    print(f"{len(images)} images, level {level.resolution}, {points.dims} dimensions\n")
    print("| method | bits/dim of the level | over the density | seconds an image |")
    print("|---|---|---|---|")
    for name, found in bits.items():
        excess = [a - b for a, b in zip(found, bits[DENSITY], strict=True)]
        error = statistics.stdev(excess) / len(excess) ** 0.5 if len(excess) > 1 else math.nan
        over = "" if name == DENSITY else f"{statistics.mean(excess):+.4f} ± {error:.4f}"
        print(
            f"| {name} | {statistics.mean(found):.4f} | {over} | "
            f"{statistics.median(seconds[name]):.2f} |"
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
