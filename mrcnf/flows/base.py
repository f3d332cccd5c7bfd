"""What a flow is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mrcnf.flows.solve import Statistics


@dataclass
class FlowResult:
    """What a solve from data to noise tells."""

    log_prob: Tensor
    """(N,) nats."""
    latent: Tensor
    """The point reached at t = 1, shaped as y."""
    statistics: Statistics
    kinetic: Tensor | None = None
    """(N,): ∫ mean_d f_d² dt, summed over blocks (Finlay et al. 2020)."""
    frobenius: Tensor | None = None
    """(N,): ∫ ‖∂f/∂y‖²_F / D dt, estimated, summed over blocks (Finlay et al. 2020)."""
