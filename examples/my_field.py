"""A velocity field of one's own: any PyTorch code from t, y and the coarse image to dy/dt."""

import torch
from torch import Tensor, nn

import mrcnf


class Field(mrcnf.Field):
    """Dilated convolutions; time and the coarse image are further channels.

    Args:
        channels: of y.
        coarse_channels: of the coarse image, 0 for the base level.
        width: of the hidden layers: what `[field.options]` holds comes here.
    """

    def __init__(self, channels: int, coarse_channels: int = 0, *, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels + coarse_channels + 1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2),
            nn.SiLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def value(self, t: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        """dy/dt (N, C, H, W) at t, a scalar or (N,), given the coarse image (N, C', H, W)."""
        clock = t.reshape(-1, 1, 1, 1).to(y.dtype).expand(len(y), 1, *y.shape[2:])
        seen = [y, clock] if context is None else [y, clock, context]
        return self.layers(torch.cat(seen, 1))

    def hidden_weights(self) -> list[nn.Parameter]:
        """What Muon may train; Adam trains the rest, and without this method everything."""
        return [self.layers[2].weight]
