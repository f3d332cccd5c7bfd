"""Variational dequantisation: noise in the cells of the integers, shaped by a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dequantiser(nn.Module):
    """Uniform noise u in a cell bent to u' = σ(a + e^b·logit u), with a, b from the integers.

    log p(x + u') + log du'/du bounds log P of the integers for every a and b (Ho et al. 2019,
    Flow++, §3.1, whose noise comes from a flow; this is one logistic per coefficient). It
    starts at a = b = 0, which leaves u as it is.

    Args:
        channels: of the integers.
        coarse_channels: of the coarse image, 0 for a base level.
        width: channels of the two hidden layers.
    """

    def __init__(self, channels: int, coarse_channels: int, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels + coarse_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * channels, 1),
        )
        last = self.net[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, u: Tensor, y: Tensor, coarse: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bend the noise u (N, C, H, W), in [0, 1).

        Args:
            y: the integers, standardised, shaped as u.
            coarse: the coarse image, standardised.

        Returns:
            u', in (0, 1), and log du'/du (N,) in nats.
        """
        seen = y if coarse is None else torch.cat((y, coarse), 1)
        shift, log_slope = self.net(seen).to(u.dtype).chunk(2, dim=1)
        edge = torch.finfo(u.dtype).eps
        logit = u.clamp(edge, 1 - edge).logit()
        bent = shift + log_slope.exp() * logit
        log_rise = log_slope + _log_density(bent) - _log_density(logit)
        return bent.sigmoid().clamp(edge, 1 - edge), log_rise.flatten(1).sum(1)


def _log_density(x: Tensor) -> Tensor:
    """log of σ(x)·(1 - σ(x)), the logistic density."""
    return F.logsigmoid(x) + F.logsigmoid(-x)
