"""A flow of one's own: each coefficient shifted and scaled by what the coarse image says of it."""

import torch
from torch import Tensor, nn

import mrcnf


class Flow(mrcnf.Flow):
    """z = (y - m) / s, m and s from a small network on the coarse image, or constants.

    Args:
        channels: of y.
        coarse_channels: of the coarse image, 0 for the base level.
        width: of the network: what `[flow.options]` holds comes here.
    """

    solved = False  # no solver carries it

    def __init__(self, channels: int, coarse_channels: int = 0, *, width: int = 16) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.zeros(2 * channels, 1, 1))
        self.network = None
        if coarse_channels:
            self.network = nn.Sequential(
                nn.Conv2d(coarse_channels, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, 2 * channels, 3, padding=1),
            )

    def _says(self, y: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean and the log standard deviation, each shaped as y."""
        told = self.constant.expand(len(y), -1, *y.shape[2:])
        if self.network is not None:
            told = told + self.network(condition)
        mean, log_std = told.chunk(2, 1)
        return mean, 2 * torch.tanh(log_std / 2)

    def log_prob(self, y: Tensor, condition: Tensor | None = None, **_: object) -> mrcnf.FlowResult:
        """The log-density of y in nats, and the noise that it becomes."""
        mean, log_std = self._says(y, condition)
        z = (y - mean) * (-log_std).exp()
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(z)
        return mrcnf.FlowResult((normal - log_std).flatten(1).sum(1), y[0].numel(), z)

    def transport(
        self, y: Tensor, condition: Tensor | None = None, *, backwards: bool = False, **_: object
    ) -> Tensor:
        """From data to noise, or back."""
        mean, log_std = self._says(y, condition)
        return y * log_std.exp() + mean if backwards else (y - mean) * (-log_std).exp()

    def steps(self, condition: Tensor | None = None, *_: object, **__: object) -> list[mrcnf.Step]:
        """The same in invertible pieces, for `mrcnf compress`; a flow without them has no codec."""
        return [_Affine(self, condition)]


class _Affine(mrcnf.Step):
    def __init__(self, flow: Flow, condition: Tensor | None) -> None:
        self.flow, self.condition = flow, condition

    def forward(self, y: Tensor) -> Tensor:
        return self.flow.transport(y, self.condition)

    def backward(self, z: Tensor) -> Tensor:
        return self.flow.transport(z, self.condition, backwards=True)

    def log_scale(self, y: Tensor) -> Tensor:
        return -self.flow._says(y, self.condition)[1]
