"""A numerical self-test: each line states what was proved on this machine, and how closely."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mrcnf.flows import trace
from mrcnf.flows.base import log_normal
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.coupling import CouplingFlow
from mrcnf.flows.multiscale import MultiscaleFlow
from mrcnf.flows.paper_field import PaperField
from mrcnf.flows.residual_field import ResidualField
from mrcnf.flows.solve import ADAPTIVE, FIXED, Solver, solve
from mrcnf.flows.trace import Trace
from mrcnf.flows.velocity import Conditioned
from mrcnf.image import haar
from mrcnf.image.bits import bits_per_dim, log_prob_of_integers
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, ModelConfig

M = TypeVar("M", bound=torch.nn.Module)


class Finding(NamedTuple):
    """One proof: what it says, the number measured, and the bound that it must meet."""

    claim: str
    measured: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound


def run() -> Iterator[Finding]:
    """All checks, one after another, in a few seconds on a CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for check in (_haar, _uniform_pixels, _divergence, _split_couplings, _linear_flow,
                      _normalised, _gradients):  # fmt: skip
            yield from check()


def _haar() -> Iterator[Finding]:
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    error = (haar.merge(*haar.split(x)) - x).abs().max()
    yield Finding("the Haar transform is undone exactly: largest error", float(error), 1e-14)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: torch.cat([part.flatten() for part in haar.split(v)]), x[:1]
    )
    log_det = torch.linalg.slogdet(jacobian.reshape(192, 192)).logabsdet
    yield Finding("it preserves volume: log|det| by autograd", abs(float(log_det)), 1e-12)
    integers = torch.randint(0, 256, (4, 3, 8, 8))
    error = (haar.unlift(*haar.lift(integers)) - integers).abs().max()
    yield Finding("its integer form is undone exactly: largest error", float(error), 0.0)


def _uniform_pixels() -> Iterator[Finding]:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    _, log_q = dequantise(images)
    flat = log_prob_of_integers(torch.zeros(4), log_q, 192)
    bpd = bits_per_dim(flat, 192).mean()
    error = abs(float(bpd) - 8)
    yield Finding("a uniform density on [0,1]^D costs 8 bits/dim: difference", error, 1e-6)


def _divergence() -> Iterator[Finding]:
    field = _rough(ResidualField(3, 1, width=8, depth=1)).double()
    y, coarse = torch.randn(2, 3, 3, 3).double(), torch.randn(2, 1, 3, 3).double()
    f, t = Conditioned(field, coarse), torch.tensor(0.3).double()
    reference = torch.stack([_trace_by_autograd(partial(_row, f, t, y, i), y[i])
                             for i in range(2)]).detach()  # fmt: skip
    _, exact = trace.divergence(f, t, y, "exact")
    yield Finding("the exact divergence is autograd's: difference",
                  float((exact.detach() - reference).abs().max()), 1e-9)  # fmt: skip
    probes = trace.draw_probes(y, 2000)
    assert probes is not None
    _, pushed = trace.linearise(f, t, y, probes)
    draws = (probes * pushed).flatten(2).sum(2)
    draws = draws.detach()
    z = (draws.mean(0) - reference) / (draws.std(0) / math.sqrt(len(draws)))
    yield Finding("Hutchinson's estimate has no bias: standard errors off", float(z.abs().max()), 4)


def _split_couplings() -> Iterator[Finding]:
    flow = _rough(MultiscaleFlow(
        partial(CouplingFlow, couplings=2, width=4, depth=1), 1, splits=1, shuffle="context",
        prior="conditional",
    )).double().eval()  # fmt: skip
    y = torch.randn(1, 1, 4, 4).double()
    latent = flow.transport(y)
    jacobian = torch.autograd.functional.jacobian(flow.transport, y).reshape(16, 16)
    volume = torch.linalg.slogdet(jacobian).logabsdet
    found = flow.log_prob(y).log_prob - log_normal(latent)
    yield Finding("the volume of split couplings is autograd's: difference",
                  float((found - volume).detach().abs().max()), 1e-9)  # fmt: skip
    back = flow.transport(latent, backwards=True)
    yield Finding("they are undone exactly: largest error", float((back - y).detach().abs().max()),
                  1e-9)  # fmt: skip


def _linear_flow() -> Iterator[Finding]:
    matrix = torch.tensor([[-0.5, 0.3], [0.2, 0.4]], dtype=torch.float64)
    y = torch.randn(3, 2, dtype=torch.float64)
    exact = y @ torch.matrix_exp(matrix).T
    solvers = [Solver(name, steps=400, spacing=1.0) for name in FIXED if name != "euler"]
    solvers += [Solver(name, steps=0, rtol=1e-7, atol=1e-7) for name in ADAPTIVE]
    for solver in solvers:
        (end,), _ = solve(lambda t, s: (s[0] @ matrix.T,), (y,), solver)
        error = float((end - exact).abs().max())
        kind = "fixed" if solver.steps else "adaptive"
        claim = f"{kind} {solver.method} solves a linear field: largest error"
        yield Finding(claim, error, 1e-5)


def _normalised() -> Iterator[Finding]:
    """A one-bit model of four pixels: its sixteen probabilities may not sum above one."""
    config = ModelConfig((1, 2), channels=1, nbits=1)
    levels = [Level(config, r, FieldConfig(width=4, depth=1)) for r in config.resolutions]
    model = MultiResolutionFlow([_rough(level) for level in levels]).eval()
    bits = torch.tensor([[(i >> k) & 1 for k in range(4)] for i in range(16)])
    images = (bits * 255).to(torch.uint8).reshape(16, 1, 2, 2)
    with torch.no_grad():
        x, _ = dequantise(images.repeat(64, 1, 1, 1), nbits=1)
        for level in levels:
            level.fit_standardisation(x)
        bound = model.log_prob(images, draws=64, trace=Trace("exact"),
                               generator=torch.Generator().manual_seed(0))  # fmt: skip
    total = float(bound.exp().sum())
    yield Finding("the bounds on all 16 one-bit images' probabilities sum to at most 1", total, 1.0)


def _gradients() -> Iterator[Finding]:
    # Smooth in t: the residual field changes too fast near t = 0 for a few fixed steps.
    flow = ContinuousFlow([_rough(PaperField(2, 1, (4, 4))).double()])
    y, coarse = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 1, 4, 4).double()
    tight = dict(rtol=1e-8, atol=1e-8, steps=0, method="dopri5")

    def gradient(solver: Solver) -> Tensor:
        flow.zero_grad()
        generator = torch.Generator().manual_seed(0)
        flow.log_prob(y, coarse, solver=solver, generator=generator).log_prob.mean().backward()
        return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])

    direct = gradient(Solver("rk4", steps=64, spacing=1.0))
    for name in ("direct", "adjoint"):
        other = gradient(Solver(gradient=name, **tight))  # type: ignore[arg-type]
        yield Finding(f"gradients agree, fixed steps and adaptive {name}: relative difference",
                      float((other - direct).norm() / direct.norm()), 1e-4)  # fmt: skip


def _rough(module: M) -> M:
    """Random weights where the initialisation has zeros."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def _row(f: Conditioned, t: Tensor, y: Tensor, i: int, v: Tensor) -> Tensor:
    return f(t, torch.cat((y[:i], v[None], y[i + 1 :])))[i]


def _trace_by_autograd(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(f, y)
    return jacobian.reshape(y.numel(), y.numel()).diagonal().sum()
