"""The published algorithm, as a path to measure against (arXiv 2106.08462; its code's `cnf.py`).

What users would run instead of this package, on the same levels and the same weights: time
concatenated as a channel, the trace by reverse mode, e·(Jᵀe) with one Gaussian probe fixed for
a solve, adaptive bosh3 at 1e-3 in training and 1e-5 in evaluation from a first step of 1/6,
torchdiffeq's continuous adjoint, and samples that carry their density along. Two faults are
put right here, or it would not be comparable: the last step ends at t = 1, and every level
sees the same dequantisation noise. Only fields of the kind "paper" have this form.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mrcnf.errors import UserError
from mrcnf.flows.base import FlowResult
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.paper_field import PaperField
from mrcnf.flows.solve import Solver, State, Statistics, solve
from mrcnf.flows.tangents import Dual
from mrcnf.image.bits import bits_per_dim
from mrcnf.model.level import Level

TRAINING = Solver(
    method="bosh3", steps=0, rtol=1e-3, atol=1e-3, first_step=1 / 6, gradient="adjoint"
)
EVALUATION = Solver(method="bosh3", steps=0, rtol=1e-5, atol=1e-5, first_step=1 / 6)


class ConcatenatedField(PaperField):
    """The paper's network as published: a constant channel t before every convolution.

    Args:
        field: whose layers, and so whose weights, this one shares.
    """

    def __init__(self, field: PaperField) -> None:
        torch.nn.Module.__init__(self)
        self.layers = field.layers

    def run(self, t: Tensor, y: Dual, context: Tensor | None) -> Dual:
        if y.tangents is not None:
            raise UserError("the reference path takes its traces by reverse mode")
        h = y.value if context is None else torch.cat((y.value, context), 1)
        for i, layer in enumerate(self.layers):
            h = F.softplus(h) if i else h
            h = layer(torch.cat((torch.ones_like(h[:, :1]) * t, h), 1))
        return Dual(h)


def log_prob(
    level: Level,
    x: Tensor,
    *,
    solver: Solver = EVALUATION,
    regularise: bool = False,
    generator: torch.Generator | None = None,
) -> FlowResult:
    """As `Level.log_prob`, by the published algorithm."""
    y, context, log_det = level.prepare(x)
    zeros = [y.new_zeros(len(y)) for _ in range(3 if regularise else 1)]
    statistics, state = Statistics(), (y, *zeros)
    for field in _fields(level):
        probe = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        state, cost = _carry(level, field, state, context, probe, solver)
        statistics = statistics + cost
    y, total, *energies = state
    dims = y[0].numel()
    normal = -0.5 * (y.square().flatten(1).sum(1) + dims * math.log(2 * math.pi))
    return FlowResult(normal + total + log_det, dims, y, statistics, *energies)


def training_step(
    level: Level,
    x: Tensor,
    log_q: Tensor,
    *,
    solver: Solver = TRAINING,
    kinetic: float = 0.01,
    frobenius: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `objectives.likelihood`: the loss, whose backward pass is the adjoint's, and its parts."""
    result = log_prob(level, x, solver=solver, regularise=True, generator=generator)
    bpd = bits_per_dim(level.bound(result, x, log_q), result.dims).mean()
    assert result.kinetic is not None and result.frobenius is not None
    energy, norm = result.kinetic.mean(), result.frobenius.mean()
    parts = {"bpd": bpd.detach(), "kinetic": energy.detach(), "frobenius": norm.detach()}
    return bpd + kinetic * energy + frobenius * norm, parts


@torch.no_grad()
def sample(
    level: Level,
    latent: Tensor,
    coarse: Tensor | None,
    *,
    solver: Solver = EVALUATION,
    density: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Statistics]:
    """As `Level.generate`, and what it cost.

    Args:
        density: carry the log-density too, as the published code always does; without it, an
            ordinary solve of y alone.
    """
    context, y, statistics = level.condition(coarse), latent, Statistics()
    for field in reversed(_fields(level)):
        probe = None
        if density:
            probe = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        state: State = (y, y.new_zeros(len(y))) if density else (y,)
        (y, *_), cost = _carry(level, field, state, context, probe, solver, backwards=True)
        statistics = statistics + cost
    values = level.units.invert(y)
    return values if coarse is None else level.pyramid.up(values, coarse), statistics


def _fields(level: Level) -> list[ConcatenatedField]:
    """The level's fields in their published form."""
    found = list(level.flow) if isinstance(level.flow, ContinuousFlow) else []
    papers = [field for field in found if isinstance(field, PaperField)]
    if len(papers) != len(found) or not found:
        raise UserError("the reference path needs levels of field.kind = 'paper'")
    return [ConcatenatedField(field) for field in papers]


def _carry(
    level: Level,
    field: ConcatenatedField,
    state: State,
    context: Tensor | None,
    probe: Tensor | None,
    solver: Solver,
    backwards: bool = False,
) -> tuple[State, Statistics]:
    """One block's solve of (y, log-density in nats, kinetic energy, Frobenius norm)."""

    def dynamics(t: Tensor, state: State) -> State:
        y, *integrals = state
        if probe is None:
            return (field(t, y, context),)
        connected = torch.is_grad_enabled() and y.requires_grad
        with torch.enable_grad():
            y = y if connected else y.detach().requires_grad_()
            value = field(t, y, context)
            (pulled,) = torch.autograd.grad(value, y, probe, create_graph=True)
            rates = [(pulled * probe).flatten(1).sum(1)]
            if len(integrals) > 1:
                rates += [value.square().flatten(1).mean(1), pulled.square().flatten(1).mean(1)]
        return (value, *rates)

    ends = (1.0, 0.0) if backwards else (0.0, 1.0)
    return solve(
        dynamics,
        state,
        solver,
        *ends,
        parameters=field.run_parameters(),
        label=level.flow.name,
        check=not level.training,
    )
