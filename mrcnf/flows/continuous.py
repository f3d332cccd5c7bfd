"""The continuous flow: velocity fields, a solver and a normal base density; its short steps.

    dy/dt = f(t, y | coarse),  t = 0 data, t = 1 standard normal
    log p(y_0) = log N(y_1; 0, I) + ∫ tr(∂f/∂y) dt                 (FFJORD, eq. 3)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mrcnf import seeds
from mrcnf.errors import UserError
from mrcnf.flows import trace as tracing
from mrcnf.flows.base import Bridge, Flow, FlowResult, Sight, Step, log_normal
from mrcnf.flows.solve import Solver, SolverError, State, Statistics, runge_kutta, solve, time_grid
from mrcnf.flows.trace import Trace
from mrcnf.flows.velocity import Conditioned, Field, Local


class ContinuousFlow(Flow):
    """Velocity fields in sequence, each integrated over t ∈ [0, 1].

    Args:
        fields: the velocity fields, the first nearest to the data.
        name: what to call this flow in messages.

    >>> from mrcnf.flows.paper_field import PaperField
    >>> flow = ContinuousFlow([PaperField(1)])          # a zero field: the identity
    >>> result = flow.log_prob(torch.zeros(2, 1, 4, 4), solver=Solver(steps=2))
    >>> torch.allclose(result.log_prob, torch.tensor(-8 * math.log(2 * math.pi)))
    True
    """

    def __init__(self, fields: Sequence[Field], name: str = "flow") -> None:
        super().__init__()
        self.fields = nn.ModuleList(fields)
        self.name = name
        self.tied_to_size = any(field.tied_to_size for field in fields)
        self.halvings = max((field.halvings for field in fields), default=0)

    def __iter__(self) -> Iterator[Field]:
        for field in self.fields:
            assert isinstance(field, Field)
            yield field

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
        solver, trace = solver or Solver(), trace or Trace()
        dims = math.prod(y.shape[1:])
        # Integrals are carried per dimension, so tolerances mean nats per dimension.
        state: State = (y, *(y.new_zeros(len(y)) for _ in range(3 if regularise else 1)))
        statistics = Statistics()
        if trace.method == "calibrated" and not all(field.knows_jacobian for field in self):
            raise UserError(
                f"{self.name}: trace method calibrated needs heads that know the Jacobian; `mrcnf "
                "calibrate` fits them to levels of a residual field, for others use hutchinson"
            )
        for field in self:
            probes = tracing.draw_probes(
                y, trace.probes, method=trace.method, kind=trace.kind, generator=generator
            )
            velocity = Conditioned(field, condition)
            parameters = field.run_parameters()
            if velocity.context is not None:
                parameters.append(velocity.context)
            state, cost = solve(
                partial(_rates, velocity, trace.method, probes),
                state,
                solver,
                0.0,
                end,
                velocity=velocity,
                parameters=parameters,
                label=self.name,
                check=not self.training,
            )
            statistics = statistics + cost
        y, log_volume, *regularisers = state
        return FlowResult(log_normal(y) + dims * log_volume, dims, y, statistics, *regularisers)

    def transport(
        self,
        y: Tensor,
        condition: Tensor | None = None,
        *,
        backwards: bool = False,
        solver: Solver | None = None,
    ) -> Tensor:
        ends, fields = ((1.0, 0.0), reversed(list(self))) if backwards else ((0.0, 1.0), iter(self))
        for field in fields:
            dynamics = partial(_rate, Conditioned(field, condition))
            (y,), _ = solve(dynamics, (y,), solver or Solver(), *ends, label=self.name)
        return y

    @torch.no_grad()
    def steps(
        self,
        condition: Tensor | None = None,
        solver: Solver | None = None,
        *,
        trace: Trace | None = None,
        seed: int = 0,
        tolerance: float = 1e-6,
    ) -> Iterator[Step]:
        solver = solver or Solver()
        if not solver.steps:
            raise UserError(
                f"{self.name}: adaptive steps depend on the images, which a codec does not know "
                "yet; set solver steps > 0"
            )
        if not 0 < tolerance < math.inf:
            raise UserError(f"tolerance must be positive and finite, got {tolerance}")
        trace, points, steps = trace or Trace(), time_grid(solver, 0.0, 1.0), list[Step]()
        for field in self:
            velocity = Conditioned(field, condition)
            for t, h in zip(points[:-1], points.diff(), strict=True):
                own = seed + len(steps)
                steps.append(
                    ShortSolve(velocity, solver.method, t, h, trace, own, tolerance, self.name)
                )
        return iter(steps)

    @torch.no_grad()
    def pieces(
        self, condition: Tensor | None = None, solver: Solver | None = None
    ) -> Iterator[MidpointStep]:
        solver = solver or Solver()
        if not solver.steps:
            raise UserError(
                f"{self.name}: adaptive steps depend on the images, which a codec does not know "
                "yet; set solver steps > 0"
            )
        points, found = time_grid(solver, 0.0, 1.0).tolist(), list[MidpointStep]()
        for field in self:
            rates = _Rates(Conditioned(field, condition))
            found += [MidpointStep(rates, solver.method, *ends) for ends in pairwise(points)]
        return iter(found)

    def velocity(self, t: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        self.check_velocity()
        return self.fields[0](t, y, condition)

    def check_velocity(self) -> None:
        if len(self.fields) > 1:
            raise UserError(
                f"{self.name}: flow matching trains one field, and this flow has "
                f"{len(self.fields)}; set field.blocks = 1, or train.objective = likelihood"
            )

    def compile(self, **options: Any) -> None:
        for field in self:
            field.compile(**options)

    def hidden_weights(self) -> list[nn.Parameter]:
        return [weight for field in self for weight in field.hidden_weights()]

    def calibrate(self, noise: Tensor, cells: Tensor) -> None:
        for i, field in enumerate(self):
            field.calibrate(noise if i == 0 else torch.zeros_like(noise), cells)


class ShortSolve(Step):
    """One Runge–Kutta step of a field from t to t + h.

    Its inverse is the step back, improved by sweeps w ← w + (z - forward(w)), whose error falls
    by a factor of about h·‖∂f/∂y‖ each.

    Args:
        velocity: the field with its condition.
        method: of `solve.FIXED`.
        t, h: scalars, in double precision.
        trace: exact or hutchinson, for the diagonal.
        seed: of its probes.
        tolerance: largest element of forward(backward(z)) - z.
        label: what is being solved, for messages.
    """

    SWEEPS = 50
    SMALLEST = 1e-2
    """A diagonal is taken to be no less: an estimate may come out negative."""

    def __init__(
        self,
        velocity: Conditioned,
        method: str,
        t: Tensor,
        h: Tensor,
        trace: Trace,
        seed: int,
        tolerance: float,
        label: str,
    ) -> None:
        self.velocity, self.method, self.t, self.h = velocity, method, t, h
        self.trace, self.seed, self.tolerance, self.label = trace, seed, tolerance, label

    @torch.no_grad()
    def forward(self, y: Tensor) -> Tensor:
        (z,) = runge_kutta(
            self.method, partial(_rate, self.velocity), self.t.to(y), self.h.to(y), (y,)
        )
        return z

    @torch.no_grad()
    def backward(self, z: Tensor) -> Tensor:
        """The y that `forward` takes to z, to the tolerance.

        Raises:
            SolverError: the sweeps do not get there, as the step is too long, or the tolerance
                below what z's precision can hold.
        """
        dynamics, end = partial(_rate, self.velocity), self.t + self.h
        (y,) = runge_kutta(self.method, dynamics, end.to(z), -self.h.to(z), (z,))
        for _ in range(self.SWEEPS):
            error = z - self.forward(y)
            wrong = error.abs().flatten(1).amax(1) > self.tolerance
            if not bool(wrong.any()):
                return y
            # Image by image: what becomes of one must not depend on those beside it.
            y = torch.where(wrong[:, None, None, None], y + error, y)
        raise SolverError(
            self.label,
            f"no inverse of a step to {self.tolerance:g} in {self.SWEEPS} sweeps",
            float(self.t),
            float(self.h),
            self.SWEEPS,
            advice="Take more steps, or a tolerance that numbers of this size and precision hold.",
        )

    @torch.no_grad()
    def log_scale(self, y: Tensor) -> Tensor:
        def push(tangents: Tensor) -> Tensor:
            _, pushed = runge_kutta(
                self.method, lambda t, state: self.velocity.push(t, *state), self.t.to(y),
                self.h.to(y), (y, tangents),
            )  # fmt: skip
            return pushed

        generator = seeds.generator(self.seed, y.device)
        diagonal = tracing.diagonal(push, y, self.trace, generator)
        return diagonal.clamp_min(self.SMALLEST).log()


class MidpointStep(Bridge):
    """The midpoint rule z = x + h·f(t + h/2, y), its middle found from both ends.

    y is x and half a step forwards, or z and half a step back, by another rule. What they differ
    by should be small against the noise that y is coded with: h³/8·|d²f/dt²| for Euler steps,
    that need no more than f at the ends, which neighbouring steps share.

    Args:
        rates: of the field with its condition; the steps of one field share them.
        method: of `solve.FIXED`, for the halves.
        start, end: times.
    """

    def __init__(self, rates: _Rates, method: str, start: float, end: float) -> None:
        self.rates, self.method, self.start, self.end = rates, method, start, end
        self.t = (start + end) / 2

    @torch.no_grad()
    def ahead(self, x: Tensor) -> Sight:
        return self._middle(x, self.start)

    @torch.no_grad()
    def behind(self, z: Tensor) -> Sight:
        return self._middle(z, self.end)

    @torch.no_grad()
    def rise(self, y: Tensor) -> Tensor:
        return (self.end - self.start) * self.rates.velocity(y.new_tensor(self.t), y)

    def _middle(self, at: Tensor, t: float) -> Sight:
        local, h = self.rates.at(t, at), self.end - self.start
        (y,) = runge_kutta(
            self.method, partial(_rate, self.rates.velocity), at.new_tensor(t),
            at.new_tensor(self.t - t), (at,), first=(local.value,),
        )  # fmt: skip
        near = local.neighbours
        coupling = None if near is None else lambda noise: h * near.apply(noise)
        return Sight(y, h / 2 * local.diagonal, coupling)


class _Rates:
    """A field's velocity, and what was found out about it at the last point asked for.

    Where one step ends the next begins: what both want to know there is computed once.
    """

    def __init__(self, velocity: Conditioned) -> None:
        self.velocity = velocity
        self._last: tuple[float, Tensor, Local] | None = None

    def at(self, t: float, y: Tensor) -> Local:
        """See `Field.local`; y is known again by its identity."""
        if self._last is None or self._last[0] != t or self._last[1] is not y:
            self._last = t, y, self.velocity.local(y.new_tensor(t), y)
        return self._last[2]


def _rate(velocity: Conditioned, t: Tensor, state: State) -> State:
    return (velocity(t, state[0]),)


def _rates(
    velocity: Conditioned, method: str, probes: Tensor | None, t: Tensor, state: State
) -> State:
    """Of y, of its log-volume per dimension and, if the state has room for them, regularisers."""
    y, *integrals = state
    dims = math.prod(y.shape[1:])
    value, divergence, frobenius = tracing.estimate(velocity, t, y, method, probes)
    rates = [divergence / dims]
    if len(integrals) > 1:
        rates += [value.square().flatten(1).mean(1), frobenius / dims]
    return (value, *rates)
