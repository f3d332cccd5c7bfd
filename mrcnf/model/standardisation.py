"""The units in which a flow sees its data: standardised channels. State of the model, not data."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mrcnf.errors import UserError
from mrcnf.flows.tangents import mix

LOGIT_ALPHA = 0.05
SMALLEST_STD = 1e-4


class Standardisation(nn.Module):
    """y = axes·(values - mean) / std, channel by channel, with orthogonal axes or none.

    It starts as the identity; `fit` sets it from data.

    Args:
        channels: of the values.
        logit: take the logit of values in [0, 1] first (α = 0.05).
        turned: have axes.
    """

    mean: Tensor
    axes: Tensor | None
    std: Tensor

    def __init__(self, channels: int, *, logit: bool = False, turned: bool = True) -> None:
        super().__init__()
        self.logit = logit
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("axes", torch.eye(channels) if turned else None)
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values (N, C, H, W) to flow units, and log|det| (N,) of that map, in nats.

        Raises:
            UserError: the values have another number of channels.
        """
        if values.shape[1] != len(self.mean):  # one would be taken for all
            raise UserError(
                f"{values.shape[1]} channel(s) of coefficients where {len(self.mean)} are "
                "modelled: images must have the model's channels"
            )
        log_det = values.new_zeros(len(values))
        if self.logit:
            values, log_det = _logit(values)
        positions = math.prod(values.shape[2:])
        y = self._turn(values - self.mean) / self.std
        return y, log_det - positions * self.std.log().sum()

    def invert(self, y: Tensor) -> Tensor:
        """Flow units to values."""
        values = self._turn(y * self.std, back=True) + self.mean
        if self.logit:
            return (values.sigmoid() - LOGIT_ALPHA) / (1 - 2 * LOGIT_ALPHA)
        return values

    @torch.no_grad()
    def fit(self, values: Tensor, *, whiten: bool = False) -> None:
        """Set mean and scale from values (N, C, H, W), and with `whiten` their principal axes."""
        if self.logit:
            values, _ = _logit(values)
        if whiten and self.axes is not None:
            channels = len(self.axes)
            covariance = torch.cov(values.movedim(1, 0).flatten(1).double())
            axes = torch.linalg.eigh(covariance.reshape(channels, channels)).eigenvectors.T
            # Of the two directions of an axis, the one that makes its largest entry positive.
            largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
            self.axes.copy_(axes * largest.sign())
        turned = self._turn(values)
        mean = turned.mean((0, 2, 3))[:, None, None]
        self.mean.copy_(self._turn(mean.to(self.mean)[None], back=True)[0])
        self.std.copy_(turned.std((0, 2, 3)).clamp_min(SMALLEST_STD)[:, None, None])

    def _turn(self, values: Tensor, back: bool = False) -> Tensor:
        if self.axes is None:
            return values
        return mix(self.axes.T if back else self.axes, values)


def _logit(x: Tensor) -> tuple[Tensor, Tensor]:
    """logit(α + (1-2α)x) and its log-determinant (N,) (Dinh et al. 2017, §4.1)."""
    squeezed = LOGIT_ALPHA + (1 - 2 * LOGIT_ALPHA) * x
    y = squeezed.logit()
    slope = math.log(1 - 2 * LOGIT_ALPHA) - squeezed.log() - (-squeezed).log1p()
    return y, slope.flatten(1).sum(1)
