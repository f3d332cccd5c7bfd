"""Solving dy/dt = f(t, y): fixed Runge–Kutta steps, or torchdiffeq's adaptive ones.

The state is a tuple of tensors. A `Solver` with ``steps > 0`` takes that many fixed steps and
is differentiated through; with ``steps = 0`` torchdiffeq chooses the steps to meet rtol and
atol, and the gradient goes through them or through its continuous adjoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mrcnf.errors import UserError

State = tuple[Tensor, ...]
Dynamics = Callable[[Tensor, State], State]

# Butcher tableaus: nodes, lower-triangular coefficients, weights (Hairer, Nørsett & Wanner).
_TABLEAUS: dict[str, tuple[list[float], list[list[float]], list[float]]] = {
    "euler": ([0], [[]], [1]),
    "midpoint": ([0, 1 / 2], [[], [1 / 2]], [0, 1]),
    "heun": ([0, 1], [[], [1]], [1 / 2, 1 / 2]),
    "bosh3": ([0, 1 / 2, 3 / 4], [[], [1 / 2], [0, 3 / 4]], [2 / 9, 1 / 3, 4 / 9]),
    "rk4": (
        [0, 1 / 2, 1 / 2, 1],
        [[], [1 / 2], [0, 1 / 2], [0, 0, 1]],
        [1 / 6, 1 / 3, 1 / 3, 1 / 6],
    ),
}
FIXED = tuple(_TABLEAUS)
ADAPTIVE = ("bosh3", "dopri5", "dopri8", "adaptive_heun")
GRADIENTS = ("direct", "checkpoint", "adjoint")


@dataclass(frozen=True)
class Solver:
    """How to solve; checked when it is made."""

    method: str = "midpoint"
    """Runge–Kutta method: euler, midpoint, heun, bosh3, rk4 (fixed steps);
    bosh3, dopri5, dopri8, adaptive_heun (adaptive)."""
    steps: int = 40
    """Number of fixed steps; 0 lets the tolerances decide."""
    spacing: float = 2.0
    """Fixed steps end at t = (i/steps)^spacing: 1 is even, larger is finer near the data."""
    rtol: float = 1e-5
    """Relative tolerance of adaptive steps."""
    atol: float = 1e-5
    """Absolute tolerance of adaptive steps, in standardised units."""
    first_step: float = 0.0
    """First adaptive step, in t; 0 lets torchdiffeq choose."""
    max_evaluations: int = 5000
    """Evaluations of f after which an adaptive solve is given up."""
    gradient: str = "direct"
    """direct (through the steps), checkpoint (recompute each fixed step), or adjoint
    (torchdiffeq's continuous adjoint; adaptive only)."""

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 <= self.first_step < math.inf:
            raise UserError("solver steps and first_step must be 0 or more, and finite")
        known = FIXED if self.steps > 0 else ADAPTIVE
        kind = "with fixed steps" if self.steps > 0 else "with adaptive steps (steps = 0)"
        if self.method not in known:
            raise UserError(
                f"solver method {self.method!r} {kind}: choose one of {', '.join(known)}"
            )
        if self.gradient not in GRADIENTS:
            raise UserError(
                f"solver gradient {self.gradient!r}: choose one of {', '.join(GRADIENTS)}"
            )
        if self.steps > 0 and self.gradient == "adjoint":
            raise UserError("solver gradient 'adjoint' needs adaptive steps: set solver steps = 0")
        if self.steps == 0 and self.gradient == "checkpoint":
            raise UserError("solver gradient 'checkpoint' needs fixed steps: set solver steps > 0")
        for name in ("spacing", "rtol", "atol", "max_evaluations"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(
                    f"solver {name} must be positive and finite, got {getattr(self, name)}"
                )

    def __str__(self) -> str:
        if self.steps:
            return f"{self.method}, {self.steps} steps spaced as s^{self.spacing:g}"
        return f"{self.method}, rtol {self.rtol:g}, atol {self.atol:g}"

    def finer(self) -> Solver:
        """Twice the fixed steps, or a tenth of the tolerances."""
        changes = vars(self) | (
            {"steps": 2 * self.steps}
            if self.steps
            else {"rtol": self.rtol / 10, "atol": self.atol / 10}
        )
        return Solver(**changes)


@dataclass
class Statistics:
    """What a solve cost."""

    evaluations: int = 0
    """NFE: evaluations of the velocity."""
    accepted: int = 0
    rejected: int = 0

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.evaluations + other.evaluations,
            self.accepted + other.accepted,
            self.rejected + other.rejected,
        )


class SolverError(RuntimeError):
    """The solve failed; the message says where and what to try."""

    ADVICE = (
        "The velocity field is too stiff here, or not finite: check images and weights, loosen "
        "rtol and atol, raise max_evaluations, use fixed steps, or train with kinetic-energy "
        "regularisation or gradient clipping."
    )

    def __init__(
        self, label: str, why: str, t: float, step: float, evaluations: int, advice: str = ADVICE
    ) -> None:
        self.label, self.t, self.step, self.evaluations = label, t, step, evaluations
        super().__init__(
            f"{label}: {why} at t = {t:.4g} (last step {step:.3g}, {evaluations} evaluations). "
            f"{advice}"
        )


def solve(
    dynamics: Dynamics,
    state: State,
    solver: Solver,
    t0: float = 0.0,
    t1: float = 1.0,
    *,
    velocity: Callable[[Tensor, Tensor], Tensor] | None = None,
    parameters: Sequence[Tensor] = (),
    label: str = "solve",
    check: bool = True,
) -> tuple[State, Statistics]:
    """Carry the state from t0 to t1.

    Args:
        dynamics: (t, state) → time derivatives, shaped as the state.
        t0, t1: ends of the path, usually 0 and 1; t1 < t0 goes backwards over the same points.
        velocity: (t, y) → the rate of the state's first part alone, if all rates depend on that
            part alone and the others are mere integrals: fixed steps then skip the integrands
            where their weight is zero (half of the midpoint rule's evaluations).
        parameters: all tensors the adjoint is to differentiate by, beside the state.
        label: what is being solved, for messages.
        check: raise on a non-finite result (one synchronisation with the device).

    Raises:
        SolverError: step underflow, too many evaluations, or a non-finite state.
    """
    if solver.steps:
        state, statistics = _fixed(dynamics, state, solver, t0, t1, velocity)
    else:
        state, statistics = _adaptive(dynamics, state, solver, t0, t1, parameters, label)
    if check and not bool(torch.stack([s.isfinite().all() for s in state]).all()):
        raise SolverError(label, "non-finite state", t1, 0.0, statistics.evaluations)
    return state, statistics


def time_grid(
    solver: Solver, t0: float, t1: float, device: torch.device | None = None
) -> Tensor:
    """The steps + 1 points of a fixed-step solve, in double precision."""
    low, high = min(t0, t1), max(t0, t1)
    points = torch.linspace(0, 1, solver.steps + 1, dtype=torch.float64, device=device)
    points = points**solver.spacing
    points = low + (high - low) * points
    return points if t0 <= t1 else points.flip(0)


def _fixed(
    dynamics: Dynamics,
    state: State,
    solver: Solver,
    t0: float,
    t1: float,
    velocity: Callable[[Tensor, Tensor], Tensor] | None,
) -> tuple[State, Statistics]:
    def step(t: Tensor, h: Tensor, *y: Tensor) -> State:
        return runge_kutta(solver.method, dynamics, t, h, y, velocity)

    # Made on the device: a copy from here would wait for it, and bar CUDA graphs.
    points = time_grid(solver, t0, t1, state[0].device)
    starts = points[:-1].to(state[0])
    widths = points.diff().to(state[0])
    for t, h in zip(starts, widths, strict=True):
        if solver.gradient == "checkpoint" and torch.is_grad_enabled():
            state = checkpoint(step, t, h, *state, use_reentrant=False)
        else:
            state = step(t, h, *state)
    stages = len(_TABLEAUS[solver.method][0])
    return state, Statistics(stages * solver.steps, solver.steps)


def runge_kutta(
    method: str,
    dynamics: Dynamics,
    t: Tensor,
    h: Tensor,
    state: State,
    velocity: Callable[[Tensor, Tensor], Tensor] | None = None,
    first: State | None = None,
) -> State:
    """One step of a method of `FIXED` from t to t + h.

    Args:
        velocity: as for `solve`.
        first: the rates at t, if they are known.
    """
    nodes, coefficients, weights = _TABLEAUS[method]
    slopes: list[State] = []
    if first is not None:
        slopes.append(first)
    stages = list(zip(nodes, coefficients, weights, strict=True))
    for node, row, weight in stages[len(slopes) :]:
        now = t + node * h
        if velocity is None:
            slopes.append(dynamics(now, _combine(state, h, row, slopes)))
            continue
        (moved,) = _combine(state[:1], h, row, slopes)
        slopes.append(dynamics(now, (moved, *state[1:])) if weight else (velocity(now, moved),))
    return _combine(state, h, weights, slopes)


def _combine(y: State, h: Tensor, weights: Sequence[float], slopes: Sequence[State]) -> State:
    terms = [(w, slope) for w, slope in zip(weights, slopes, strict=True) if w]
    if not terms:
        return y
    return tuple(
        start + h * sum((w * slope[i] if w != 1 else slope[i]) for w, slope in terms)
        for i, start in enumerate(y)
    )


class _Counted(nn.Module):
    """The dynamics with the counts and the limit that torchdiffeq does not keep."""

    def __init__(
        self, dynamics: Dynamics, limit: int, label: str, t0: float, t1: float
    ) -> None:
        super().__init__()
        self.dynamics, self.limit, self.label = dynamics, limit, label
        self.low, self.high = min(t0, t1), max(t0, t1)
        self.statistics = Statistics()
        self.t, self.step = t0, 0.0

    def forward(self, t: Tensor, state: State) -> State:
        self.statistics.evaluations += 1
        if self.statistics.evaluations > self.limit:
            raise self.error("too many evaluations")
        # Choosing its first step, torchdiffeq tries slow fields at times far outside, up to 100.
        return self.dynamics(t.clamp(self.low, self.high), state)

    def error(self, why: str) -> SolverError:
        return SolverError(self.label, why, self.t, self.step, self.statistics.evaluations)

    # torchdiffeq calls these by name.
    def callback_step(self, t: Tensor, y: object, dt: Tensor) -> None:
        self.t, self.step = float(t.detach()), float(dt.detach())

    def callback_accept_step(self, t: Tensor, y: object, dt: Tensor) -> None:
        self.statistics.accepted += 1

    def callback_reject_step(self, t: Tensor, y: object, dt: Tensor) -> None:
        self.statistics.rejected += 1

    def callback_step_adjoint(self, t: Tensor, y: State, dt: Tensor) -> None:
        # In a backward pass nobody stands by to translate torchdiffeq's AssertionError.
        self.callback_step(t, y, dt)
        if not bool(t + dt > t) or not all(bool(part.isfinite().all()) for part in y):
            raise self.error("the adjoint's backward solve failed")


def _adaptive(
    dynamics: Dynamics,
    state: State,
    solver: Solver,
    t0: float,
    t1: float,
    parameters: Sequence[Tensor],
    label: str,
) -> tuple[State, Statistics]:
    counted = _Counted(dynamics, solver.max_evaluations, label, t0, t1)
    device = state[0].device
    times = torch.tensor([t0, t1], device=device, dtype=state[0].dtype)
    # Without step_t the last step runs past the end point, where f was never trained, and the
    # result is interpolated back.
    first = {"first_step": solver.first_step} if solver.first_step else {}
    options: dict[str, object] = {"step_t": times[1:], **first}
    shared = dict(rtol=solver.rtol, atol=solver.atol, method=solver.method, options=options)
    try:
        if solver.gradient == "adjoint" and torch.is_grad_enabled():
            trajectory = torchdiffeq.odeint_adjoint(
                counted,
                state,
                times,
                adjoint_params=tuple(p for p in parameters if p.requires_grad),
                adjoint_options={"step_t": times[:1], **first},
                **shared,
            )
        else:
            trajectory = torchdiffeq.odeint(counted, state, times, **shared)
    except AssertionError as error:
        raise counted.error(str(error) or "the solver failed") from None
    return tuple(part[-1] for part in trajectory), counted.statistics
