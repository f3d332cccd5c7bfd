"""Divergence of a velocity field: exact or estimated; forward mode throughout.

The rate of change of a log-density along dy/dt = f(t, y) is -∇·f, the trace of the Jacobian
J = ∂f/∂y (Chen et al. 2018, eq. 8). Forward mode gives f and J·e from one pass: fields of this
package push ``[y; e_1; …; e_K]`` through every layer (`velocity`), any other function
goes through `torch.func.jvp`. Nothing here needs a backward pass of its own, so a loss built
on a divergence is differentiated once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mrcnf.errors import UserError

Velocity = Callable[[Tensor, Tensor], Tensor]

METHODS = ("exact", "hutchinson", "hutch++", "calibrated")
PROBES = ("rademacher", "gaussian")
CHUNK = 256
"""Unit tangents that an exact trace pushes at a time."""


@dataclass(frozen=True)
class Trace:
    """How to measure divergence; checked when it is made."""

    method: str = "hutchinson"
    """exact, hutchinson, hutch++, or calibrated: Hutchinson on what the heads of `mrcnf calibrate`
    leave to find."""
    probes: int = 1
    """Random probes, fixed for a whole solve (the exact trace needs none)."""
    kind: str = "rademacher"
    """rademacher or gaussian."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(
                f"trace method {self.method!r}: choose one of {', '.join(METHODS)}"
            )
        if self.kind not in PROBES:
            raise UserError(f"trace kind {self.kind!r}: choose one of {', '.join(PROBES)}")
        if self.probes < 1:
            raise UserError(f"trace probes must be at least 1, got {self.probes}")

    def __str__(self) -> str:
        return "exact" if self.method == "exact" else f"{self.method}, {self.probes} {self.kind}"


class Divergence(NamedTuple):
    """A field's value with what its linearisation tells."""

    value: Tensor
    """f(t, y), shaped as y."""
    divergence: Tensor
    """(N,): the trace of ∂f/∂y, or its unbiased estimate."""
    frobenius: Tensor
    """(N,): the squared Frobenius norm of ∂f/∂y, or its unbiased estimate E‖J e‖²."""


class Known(NamedTuple):
    """A field's value, products with its Jacobian J, and with a matrix K that is close to J."""

    value: Tensor
    """f(t, y), shaped as y."""
    pushed: Tensor
    """J·e for tangents e, shaped as those (K, N, …)."""
    known: Tensor
    """K·e, shaped as that."""
    trace: Tensor
    """(N,): the trace of K."""


def divergence(
    f: Velocity,
    t: Tensor,
    y: Tensor,
    method: str = "hutchinson",
    probes: int | Tensor = 1,
    generator: torch.Generator | None = None,
    kind: str = "rademacher",
) -> tuple[Tensor, Tensor]:
    """Value and divergence of f at (t, y).

    Args:
        f: maps a scalar t and y of shape (N, …) to (N, …), each row by itself.
        y: (N, …).
        method: "exact" (one tangent per dimension), "hutchinson" (mean of e·J e;
            Hutchinson 1990), "hutch++" (exact on a sketched subspace, Hutchinson on the
            rest; Meyer et al. 2021, algorithm 1) or "calibrated" (tr K plus the mean of
            e·(J - K)·e, for the matrix K that f's `push_known` knows: a control variate).
        probes: how many to draw, or a tensor (K, N, …) of probes to use; hutch++ takes an even
            number, the first half for sketching.
        generator: on the device of y.
        kind: "rademacher" or "gaussian".

    Returns:
        f(t, y), shaped as y, and the divergence (N,).
    """
    if method != "exact" and not isinstance(probes, Tensor):
        drawn = draw_probes(y, probes, method=method, kind=kind, generator=generator)
    else:
        drawn = probes if isinstance(probes, Tensor) else None
    result = estimate(f, t, y, method, drawn)
    return result.value, result.divergence


def draw_probes(
    y: Tensor,
    count: int,
    *,
    method: str = "hutchinson",
    kind: str = "rademacher",
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """Probes (K, N, …) for `estimate`, to be kept for a whole solve; None for the exact trace.

    Hutch++ with K probes evaluates K + K tangents on K sketching directions: they are drawn
    here as 2K probes.
    """
    if method == "exact":
        return None
    if method not in METHODS:
        raise UserError(f"unknown trace method {method!r}; choose one of {', '.join(METHODS)}")
    if count < 1:
        raise UserError(f"trace probes must be at least 1, got {count}")
    shape = (2 * count if method == "hutch++" else count, *y.shape)
    if kind == "gaussian":
        return torch.randn(shape, generator=generator, device=y.device, dtype=y.dtype)
    if kind != "rademacher":
        raise UserError(f"unknown probes {kind!r}; choose one of {', '.join(PROBES)}")
    signs = torch.randint(0, 2, shape, generator=generator, device=y.device, dtype=torch.int8)
    return signs.to(y.dtype) * 2 - 1


def estimate(
    f: Velocity, t: Tensor, y: Tensor, method: str, probes: Tensor | None
) -> Divergence:
    """As `divergence`, with given probes, and the Frobenius norm."""
    if method == "exact":
        return _exact(f, t, y)
    if method not in METHODS:
        raise UserError(f"unknown trace method {method!r}; choose one of {', '.join(METHODS)}")
    if probes is None or (method == "hutch++" and len(probes) % 2):
        raise UserError(f"trace method {method!r} needs probes (an even number for hutch++)")
    if method == "hutch++":
        return _hutch_plus_plus(f, t, y, probes)
    if method == "calibrated":
        return _calibrated(f, t, y, probes)
    value, pushed = linearise(f, t, y, probes)
    return Divergence(value, _dot(probes, pushed).mean(0), _dot(pushed, pushed).mean(0))


def linearise(f: Velocity, t: Tensor, y: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """f(t, y), and J·e for each tangent: (K, N, …) → (K, N, …)."""
    push = getattr(f, "push", None)
    if push is not None:
        return push(t, y, tangents)

    def one(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda at: f(t, at), (y,), (tangent,))  # type: ignore[return-value]

    values, pushed = torch.func.vmap(one, randomness="same")(tangents)
    return values[0], pushed


def diagonal(
    push: Callable[[Tensor], Tensor], y: Tensor, trace: Trace, generator: torch.Generator
) -> Tensor:
    """The diagonal of a linear map of y's space, shaped as y: exact, or its unbiased estimate.

    Args:
        push: tangents (K, N, …) to what the map makes of them.
        trace: "exact", or "hutchinson": the mean of e·(J e) over probes, element by element
            (Bekas, Kokiopoulou & Saad 2007).

    Raises:
        UserError: the method is another, which knows traces alone.
    """
    if trace.method == "exact":
        parts = [(basis * push(basis)).sum(0) for basis in _bases(y)]
        return torch.stack(parts).sum(0)
    if trace.method != "hutchinson":
        raise UserError(f"a diagonal cannot be had by {trace.method}; use exact or hutchinson")
    # The same for every image: an image's diagonal must not depend on those beside it.
    probes = draw_probes(y[:1], trace.probes, kind=trace.kind, generator=generator)
    assert probes is not None
    probes = probes.expand(-1, *y.shape)
    return (probes * push(probes)).mean(0)


def _bases(y: Tensor) -> Iterator[Tensor]:
    """The unit tangents (K, N, …) of every image of y, some at a time."""
    identity = torch.eye(math.prod(y.shape[1:]), device=y.device, dtype=y.dtype)
    for rows in identity.split(CHUNK):
        yield rows.reshape(-1, 1, *y.shape[1:]).expand(-1, *y.shape)


def _exact(f: Velocity, t: Tensor, y: Tensor) -> Divergence:
    trace = frobenius = y.new_zeros(len(y))
    for basis in _bases(y):
        value, pushed = linearise(f, t, y, basis)
        trace = trace + _dot(basis, pushed).sum(0)
        frobenius = frobenius + _dot(pushed, pushed).sum(0)
    return Divergence(value, trace, frobenius)


def _hutch_plus_plus(f: Velocity, t: Tensor, y: Tensor, probes: Tensor) -> Divergence:
    sketch, rest = probes.chunk(2)
    dims = math.prod(y.shape[1:])
    if len(sketch) > dims:
        raise UserError(
            f"hutch++ with {len(sketch)} probes on {dims} dimensions: use the exact trace"
        )
    # Any basis gives an unbiased estimate, so the gradient need not pass through it; through a
    # QR of fewer than K independent columns (a field of zeros, say) it would be NaN.
    with torch.no_grad():
        _, pushed = linearise(f, t, y, sketch)
        basis, _ = torch.linalg.qr(_columns(pushed))  # (N, D, K), orthonormal
    flat = _columns(rest)
    flat = flat - basis @ (basis.mT @ flat)
    directions = torch.cat((_tangents(basis, y), _tangents(flat, y)))
    value, pushed = linearise(f, t, y, directions)
    along, across = _dot(directions, pushed).chunk(2)
    spread, rest_spread = _dot(pushed, pushed).chunk(2)
    return Divergence(value, along.sum(0) + across.mean(0), spread.sum(0) + rest_spread.mean(0))


def _calibrated(f: Velocity, t: Tensor, y: Tensor, probes: Tensor) -> Divergence:
    push = getattr(f, "push_known", None)
    if push is None:
        raise UserError("trace method calibrated: this function does not define push_known()")
    value, pushed, known, trace = push(t, y, probes)
    rest = _dot(probes, pushed - known).mean(0)
    return Divergence(value, trace + rest, _dot(pushed, pushed).mean(0))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over everything but the first two axes: (K, N, …) → (K, N)."""
    return (a * b).flatten(2).sum(2)


def _columns(tangents: Tensor) -> Tensor:
    return tangents.flatten(2).permute(1, 2, 0)


def _tangents(columns: Tensor, y: Tensor) -> Tensor:
    return columns.permute(2, 0, 1).reshape(-1, *y.shape)
