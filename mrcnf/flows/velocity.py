"""Velocity fields f(t, y | coarse): what every network that moves pixels to noise must be.

Every layer works on a `Dual`: a value and, when a trace is wanted, its tangents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mrcnf import runtime
from mrcnf.errors import UserError
from mrcnf.flows.near_diagonal import Neighbours
from mrcnf.flows.tangents import Dual
from mrcnf.flows.trace import Known, linearise


class Local(NamedTuple):
    """A field's value, and what is known of its Jacobian there."""

    value: Tensor
    """f(t, y), shaped as y."""
    diagonal: Tensor
    """An estimate of the diagonal of ∂f/∂y, shaped as y; it may be all zeros."""
    neighbours: Neighbours | None = None
    """An estimate of the couplings of positions that lie side by side."""


class Field(nn.Module):
    """Base of the velocity fields: subclasses define `run` or `value`, and `context` if they wish.

    `value` may be any PyTorch code; products with the Jacobian are then PyTorch's forward-mode
    derivatives. `run` says them itself, for value and tangents in one pass, which is faster.

    f(t, y) takes y (N, C, H, W) of any height and width, and t, a scalar or (N,), and returns the
    velocity, shaped as y. `context` turns a coarse image into what `run` wants of it, once per
    solve.
    """

    tied_to_size = False
    """Whether it is of use at the height and width alone that it was trained on."""
    halvings = 0
    """How often it halves height and width on its way, which must allow that."""

    @property
    def knows_jacobian(self) -> bool:
        """Whether `push_known` has something to say."""
        return False

    def run(self, t: Tensor, y: Dual, context: Tensor | None) -> Dual:
        """f(t, y) with, where y has tangents, their images under ∂f/∂y."""
        raise TypeError(f"{type(self).__name__} does not define run() or value()")

    def context(self, coarse: Tensor | None) -> Tensor | None:
        return coarse

    def run_parameters(self) -> list[Tensor]:
        """The parameters that `run` uses: all but those that `context` is made with.

        The continuous adjoint differentiates by these and by the context, which hands its
        gradient on; given the context's own parameters as well, it would count them twice.
        """
        return list(self.parameters())

    def calibrate(self, noise: Tensor, cells: Tensor) -> None:
        """Learn the units of the data: called whenever a level is standardised.

        Args:
            noise: (C, 1, 1), the standard deviation of the Gaussian noise that y comes with.
            cells: (P, C + C_coarse + 1), the affine map from one position's y, coarse image
                and 1 to the P pixels there, counted in cells from a point of their lattice.
        """

    def hidden_weights(self) -> list[nn.Parameter]:
        """The convolution weights between hidden layers, which Muon may train."""
        return []

    # Answers are in the type of y: networks may compute in a lower one.

    def value(self, t: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        """f(t, y), given what `context` made of the coarse image."""
        return self.run(t, Dual(y), context).value.to(y.dtype)

    def push(
        self, t: Tensor, y: Tensor, tangents: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """f(t, y) and J·e for tangents (K, N, …), in one pass."""
        if type(self).run is Field.run:
            return linearise(lambda t, y: self.value(t, y, context), t, y, tangents)
        answer = self.run(t, Dual(y, tangents), context)
        assert answer.tangents is not None
        return answer.value.to(y.dtype), answer.tangents.to(y.dtype)

    def push_known(
        self, t: Tensor, y: Tensor, tangents: Tensor, context: Tensor | None
    ) -> Known:
        """As `push`, with a matrix near the Jacobian, for a trace that leaves less to chance; only
        where one is known (`knows_jacobian`)."""
        raise TypeError(f"{type(self).__name__} knows nothing of its Jacobian")

    def local(self, t: Tensor, y: Tensor, context: Tensor | None) -> Local:
        """f(t, y) with as much of ∂f/∂y as comes for next to nothing; here, that is nothing."""
        return Local(self.value(t, y, context), torch.zeros_like(y))

    def forward(self, t: Tensor, y: Tensor, coarse: Tensor | None = None) -> Tensor:
        return _shaped(self, self.value(t, y, self.context(coarse)), y)

    def compile(self, **options: Any) -> None:
        """Compile f as a whole, for flow matching, and in the parts that solvers call."""
        methods = ("forward", "context", "value", "local", "push", "push_known")
        runtime.compile_methods(self, *methods, **options)


class Conditioned:
    """A field with its coarse image bound: the f(t, y) that solvers and traces see."""

    def __init__(self, field: Field, coarse: Tensor | None) -> None:
        self.field, self.context = field, field.context(coarse)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return _shaped(self.field, self.field.value(t, y, self.context), y)

    def local(self, t: Tensor, y: Tensor) -> Local:
        """f(t, y) and something about ∂f/∂y, see `Field.local`."""
        return self.field.local(t, y, self.context)

    def push(self, t: Tensor, y: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """f(t, y) and J·e for tangents (K, N, …), in one pass."""
        value, pushed = self.field.push(t, y, tangents, self.context)
        return _shaped(self.field, value, y), pushed

    def push_known(self, t: Tensor, y: Tensor, tangents: Tensor) -> Known:
        """As `push`, see `Field.push_known`."""
        return self.field.push_known(t, y, tangents, self.context)


def _shaped(field: Field, value: Tensor, y: Tensor) -> Tensor:
    """The value, refused where it would be broadcast."""
    if value.shape != y.shape:
        raise UserError(
            f"{type(field).__name__} answers y of shape {tuple(y.shape)} with "
            f"{tuple(value.shape)}; a velocity is shaped as y"
        )
    return value
