"""What a flow is: the interface that levels, objectives and commands go through."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver, Statistics
from mrcnf.flows.trace import Trace


@dataclass
class FlowResult:
    """What a passage from data to noise tells."""

    log_prob: Tensor
    """(N,) nats."""
    dims: int
    """Dimensions D of one image's y."""
    latent: Tensor
    """The noise reached, shaped as y."""
    statistics: Statistics = field(default_factory=Statistics)
    kinetic: Tensor | None = None
    """(N,): ∫ mean_d f_d² dt, summed over blocks (Finlay et al. 2020)."""
    frobenius: Tensor | None = None
    """(N,): ∫ ‖∂f/∂y‖²_F / D dt, estimated, summed over blocks (Finlay et al. 2020)."""
    penalty: Tensor | None = None
    """(N,): what the flow asks to be added to the loss of bits/dim in training."""


def log_normal(z: Tensor) -> Tensor:
    """Log-density of z (N, …) under the standard normal: (N,) nats."""
    flat = z.flatten(1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))


BOUND = 2.0
"""Log-scales that networks answer with lie within ± this."""


def bounded(log_scale: Tensor) -> Tensor:
    """A network's answer, any number, as a log-scale within ± `BOUND`."""
    return BOUND * (log_scale / BOUND).tanh()


class Step(ABC):
    """A short invertible piece of a flow, for coding: none of it is differentiable."""

    kept: int = 0
    """How many of the leading channels it leaves as they are; the others depend on them."""
    shrink: float = 1.0
    """By what it divides height and width."""

    @abstractmethod
    def forward(self, y: Tensor) -> Tensor:
        """y (N, C, H, W) a piece of the way on to the noise."""

    @abstractmethod
    def backward(self, z: Tensor) -> Tensor:
        """The y that `forward` takes to z, as exactly as was asked for."""

    @abstractmethod
    def log_scale(self, y: Tensor) -> Tensor:
        """Log of the diagonal of `forward`'s Jacobian at y, shaped as y; exact or an estimate."""


class Lift(Step):
    """A step that keeps volumes: it moves values about, or adds to some what others say.

    With the sums rounded it is as invertible as without, so it is exact on any lattice.
    Its `log_scale` is 0 for all: not always its diagonal, but what its volumes add up to.
    """

    @abstractmethod
    def lift(self, y: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        """`forward`, with all that is added to elements of y passed through `rounded`."""

    @abstractmethod
    def drop(self, z: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        """The y that `lift` takes to z."""

    def forward(self, y: Tensor) -> Tensor:
        return self.lift(y, _unrounded)

    def backward(self, z: Tensor) -> Tensor:
        return self.drop(z, _unrounded)

    def log_scale(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)


class Sight(NamedTuple):
    """The middle of a bridge as it is seen from one of its ends."""

    y: Tensor
    """Where it should be."""
    half: Tensor
    """Half of what is known of log(∂z/∂x), the piece's diagonal, shaped as y."""
    coupling: Callable[[Tensor], Tensor] | None = None
    """Its Jacobian between positions of one colour of a chequerboard and of the other, where it is
    known: applied to a tensor shaped as y that is zero in one colour, good in the other."""


class Bridge(ABC):
    """A short piece of a flow over a point y in its middle, which both of its ends nearly know.

    From x it leads to z = x + rise(y). With the sum rounded that is exact on any lattice for
    every y, also for one that is noisy, and so a codec need not invert anything.
    """

    t: float
    """The time of its middle: 0 data, 1 noise."""

    @abstractmethod
    def ahead(self, x: Tensor) -> Sight:
        """y as x (N, C, H, W) sees it."""

    @abstractmethod
    def behind(self, z: Tensor) -> Sight:
        """y as z sees it."""

    @abstractmethod
    def rise(self, y: Tensor) -> Tensor:
        """z - x."""


@dataclass(frozen=True)
class Leave:
    """Where some channels leave a split flow: they are noise by now, given those that stay."""

    stays: int
    """How many of the leading channels go on; the others leave."""
    prior: Callable[[Tensor], tuple[Tensor, Tensor]]
    """From what stays (N, stays, H, W), mean and log standard deviation of what leaves, each
    shaped as that: it is normal, element by element."""


def _unrounded(x: Tensor) -> Tensor:
    return x


class Flow(nn.Module, ABC):
    """An invertible map from what a level models to standard normal noise, given a condition.

    y is (N, C, H, W) of any height and width that the networks take, the condition (N, C', H, W)
    or None. Levels make theirs in `model.level`; tests/flows/test_contract.py takes every flow
    through what is promised here.
    """

    name: str
    """What to call this flow in messages."""
    tied_to_size: bool = False
    """Whether it is of use at the height and width alone that it was trained on (see `tiled`)."""
    solved: bool = True
    """Whether a solver carries it, whose settings matter."""
    reorders: bool = False
    """Whether it has orders that are measured (`reorder`)."""
    halvings: int = 0
    """How often it halves height and width, which must allow that."""

    @abstractmethod
    def log_prob(
        self,
        y: Tensor,
        condition: Tensor | None = None,
        *,
        solver: Solver | None = None,
        trace: Trace | None = None,
        end: float = 1.0,
        regularise: bool = False,
        generator: torch.Generator | None = None,
    ) -> FlowResult:
        """Log-density of y (N, C, H, W), in nats.

        Args:
            solver, trace, end: of flows that are solved: how, and the time at which the path ends
                (STEER moves it in training, for each block).
            regularise: the kinetic energy and the Frobenius norm too.
            generator: for random probes, on the device of y.

        Raises:
            SolverError: a solve failed.
        """

    @abstractmethod
    def transport(
        self,
        y: Tensor,
        condition: Tensor | None = None,
        *,
        backwards: bool = False,
        solver: Solver | None = None,
    ) -> Tensor:
        """Carry y (N, C, H, W) from data to noise, or backwards, without its density."""

    def steps(
        self,
        condition: Tensor | None = None,
        solver: Solver | None = None,
        *,
        trace: Trace | None = None,
        seed: int = 0,
        tolerance: float = 1e-6,
    ) -> Iterator[Step | Leave]:
        """The same map as short invertible pieces, from data to noise.

        After a `Leave`, they go on with what stays.

        Args:
            trace: how `Step.log_scale` finds a diagonal: exact, or estimated from probes.
            seed: of the probes, which are the same whenever a step is asked.
            tolerance: largest element of forward(backward(z)) - z.

        Raises:
            UserError: it has none, and so cannot be coded.
        """
        raise UserError(
            f"{self.name}: a {type(self).__name__} defines no steps(), which a codec needs"
        )

    def pieces(
        self, condition: Tensor | None = None, solver: Solver | None = None
    ) -> Iterator[Step | Bridge | Leave]:
        """As `steps`, in the form that is coded best; `solver` as for `Flow.log_prob`."""
        return self.steps(condition, solver)

    def compile(self, **options: Any) -> None:
        """Compile the networks with torch.compile, for all of the above and for training.

        Raises:
            UserError: it does not say how.
        """
        raise UserError(
            f"{self.name}: a {type(self).__name__} defines no compile(); set train.compile and "
            "evaluate.compile to false"
        )

    def hidden_weights(self) -> list[nn.Parameter]:
        """The convolution weights between hidden layers, which Muon may train."""
        return []

    def calibrate(self, noise: Tensor, cells: Tensor) -> None:
        """Learn the units of the data, see `velocity.Field.calibrate`."""

    def initialise(
        self, y: Tensor, condition: Tensor | None = None, solver: Solver | None = None
    ) -> None:
        """Set from data y, before training, what is to start from data."""

    def reorder(
        self, y: Tensor, condition: Tensor | None = None, solver: Solver | None = None
    ) -> None:
        """Measure on data y, in training, the orders that depend on what has been learned."""

    def velocity(self, t: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """dy/dt at times t (N,), which flow matching regresses: of flows that have one.

        Raises:
            UserError: as `check_velocity`.
        """
        self.check_velocity()
        raise AssertionError(f"{type(self).__name__} has a velocity and does not say which")

    def check_velocity(self) -> None:
        """A UserError unless this flow is one velocity field over t ∈ [0, 1]."""
        raise UserError(
            f"{self.name}: flow matching trains a velocity, which a {type(self).__name__} does "
            "not have; set train.objective = likelihood"
        )
