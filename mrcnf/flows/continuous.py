"""One continuous flow: velocity fields, a solver and a normal base density.

    dy/dt = f(t, y | coarse),  t = 0 data, t = 1 standard normal
    log p(y_0) = log N(y_1; 0, I) + ∫ tr(∂f/∂y) dt                 (FFJORD, eq. 3)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mrcnf.flows import trace as tracing
from mrcnf.flows.base import FlowResult
from mrcnf.flows.solve import Solver, State, Statistics, solve
from mrcnf.flows.trace import Trace
from mrcnf.flows.velocity import Conditioned, Field


class ContinuousFlow(nn.Module):
    """A stack of velocity fields, each integrated over t ∈ [0, 1].

    Args:
        fields: the velocity fields, the first nearest to the data.
        name: what to call this flow in messages.

    >>> from mrcnf.velocity import PaperField
    >>> flow = ContinuousFlow([PaperField(1)])          # a zero field: the identity
    >>> result = flow.log_prob(torch.zeros(2, 1, 4, 4), solver=Solver(steps=2))
    >>> torch.allclose(result.log_prob, torch.tensor(-8 * math.log(2 * math.pi)))
    True
    """

    def __init__(self, fields: Sequence[Field], name: str = "flow") -> None:
        super().__init__()
        self.fields = nn.ModuleList(fields)
        self.name = name

    def hidden_weights(self) -> list[nn.Parameter]:
        """The convolution weights between hidden layers, of all fields."""
        return [w for field in self.fields for w in field.hidden_weights()]  # type: ignore[operator]

    def log_prob(
        self,
        y: Tensor,
        coarse: Tensor | None = None,
        *,
        solver: Solver | None = None,
        trace: Trace | None = None,
        start: float = 0.0,
        end: float = 1.0,
        regularise: bool = False,
        generator: torch.Generator | None = None,
    ) -> FlowResult:
        """Log-density of y (N, C, H, W), given the coarse image if the fields take one.

        Args:
            start: time at which y lies on the first field's path (its data end is 0).
            end: time at which the path ends (STEER moves it in training, for each block).
            regularise: integrate kinetic energy and Frobenius norm too.
            generator: for the probes, on the device of y.

        Raises:
            SolverError: the solve failed.
        """
        solver, trace = solver or Solver(), trace or Trace()
        dims = math.prod(y.shape[1:])
        # Integrals are carried per dimension, so tolerances mean nats per dimension.
        totals = [y.new_zeros(len(y)) for _ in range(3 if regularise else 1)]
        statistics = Statistics()
        for i, field in enumerate(self.fields):
            probes = tracing.draw_probes(
                y, trace.probes, method=trace.method, kind=trace.kind, generator=generator
            )
            velocity = Conditioned(field, coarse)  # type: ignore[arg-type]

            def dynamics(
                t: Tensor,
                state: State,
                velocity: Conditioned = velocity,
                probes: Tensor | None = probes,
            ) -> State:
                value, divergence, frobenius = tracing.estimate(
                    velocity, t, state[0], trace.method, probes
                )
                rates = [divergence / dims]
                if regularise:
                    rates += [value.square().flatten(1).mean(1), frobenius / dims]
                return (value, *rates)

            parameters = field.run_parameters()  # type: ignore[operator]
            if velocity.context is not None:
                parameters.append(velocity.context)
            (y, *totals), cost = solve(
                dynamics,
                (y, *totals),
                solver,
                start if i == 0 else 0.0,
                end,
                velocity=velocity,
                parameters=parameters,
                label=self.name,
                check=not self.training,
            )
            statistics = statistics + cost
        normal = -0.5 * (y.square().flatten(1).sum(1) + dims * math.log(2 * math.pi))
        return FlowResult(normal + dims * totals[0], y, statistics, *totals[1:])

    def transport(
        self,
        y: Tensor,
        coarse: Tensor | None = None,
        *,
        backwards: bool = False,
        solver: Solver | None = None,
        start: float = 0.0,
    ) -> Tensor:
        """Carry y (N, C, H, W) from data to noise, or backwards, without its density."""
        order = list(enumerate(self.fields))
        for i, field in reversed(order) if backwards else order:
            velocity = Conditioned(field, coarse)  # type: ignore[arg-type]
            ends = (start if i == 0 else 0.0, 1.0)
            (y,), _ = solve(
                lambda t, state, v=velocity: (v(t, state[0]),),  # type: ignore[misc]
                (y,),
                solver or Solver(),
                *(reversed(ends) if backwards else ends),
                label=self.name,
            )
        return y
