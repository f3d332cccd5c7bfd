"""Learned noise in the cells of the integers: variational dequantisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrcnf.image import haar

PAIRS = ((0, 1), (2, 3), (0, 2), (1, 3))
"""Corners of a patch, of `haar.patches`, whose noise is bent in pairs, in this order."""


class LearnedNoise(nn.Module):
    """Uniform noise u in each cell bent to u' = σ(a + e^b·logit u), with a, b from the integers.

    log p(x + u') + log du'/du bounds log P of the integers for every a and b (Ho et al. 2019,
    Flow++, §3.1, whose noise comes from a flow; this is one logistic per coefficient). It
    starts at a = b = 0, which leaves u as it is.

    With `pairs` the mean of the noise of every 2×2 patch of pixels stays what it was, and with
    it every exact mean, so the coarser levels see nothing of it: of two pixels with
    u1 + u2 = s, u1 has the interval from max(0, s - 1) to min(1, s), and its place in there is
    bent as above. The rows of a patch are bent one after the other, then its columns.

    Args:
        channels: of the coefficients that the integers make.
        coarse_channels: of the coarse image, 0 for a base level.
        pairs: how many channels the pixels have, whose noise is bent in pairs; 0 bends the noise
            of each coefficient by itself.
        width: channels of the two hidden layers.
    """

    def __init__(
        self, channels: int, coarse_channels: int, pairs: int = 0, width: int = 32
    ) -> None:
        super().__init__()
        self.pairs = pairs
        bends = len(PAIRS) * pairs if pairs else channels
        self.net = nn.Sequential(
            nn.Conv2d(channels + coarse_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * bends, 1),
        )
        last = self.net[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, u: Tensor, y: Tensor, coarse: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bend the noise u, in [0, 1).

        Args:
            u: noise of the coefficients (N, C, H, W), or with `pairs` of the pixels
                (N, pairs, 2H, 2W).
            y: the coefficients of the cells' centres, standardised (N, C, H, W).
            coarse: the coarse image, standardised.

        Returns:
            u', in [0, 1), and log|∂u'/∂u| (N,) in nats.
        """
        shift, log_slope = (part.to(u.dtype) for part in self.bends(y, coarse))
        if not self.pairs:
            bent, log_rise = bend(u, shift, log_slope)
            return bent, log_rise.flatten(1).sum(1)
        corners, total = list(haar.patches(u)), torch.zeros_like(u[:, 0, 0, 0])
        below_one = 1 - torch.finfo(u.dtype).eps  # which rounding might reach
        count = len(PAIRS)
        bends = zip(PAIRS, shift.chunk(count, 1), log_slope.chunk(count, 1), strict=True)
        for (one, other), a, b in bends:
            both = corners[one] + corners[other]
            low, size = (both - 1).clamp_min(0), torch.minimum(both, 2 - both)
            place = (corners[one] - low) / size.clamp_min(torch.finfo(u.dtype).tiny)
            place, log_rise = bend(place, a, b)
            corners[one] = (low + size * place).clamp(0, below_one)
            corners[other] = (both - corners[one]).clamp(0, below_one)
            total = total + log_rise.flatten(1).sum(1)
        return haar.interleave(*corners), total

    def bends(self, y: Tensor, coarse: Tensor | None) -> tuple[Tensor, Tensor]:
        """a and b for all noise that `forward` bends; with `pairs`, for each of `PAIRS` in turn."""
        seen = y if coarse is None else torch.cat((y, coarse), 1)
        shift, log_slope = self.net(seen).chunk(2, dim=1)
        return shift, log_slope


def bend(u: Tensor, shift: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
    """σ(shift + e^log_slope·logit u) and the log of its derivative by u, element by element."""
    edge = torch.finfo(u.dtype).eps
    logit = u.clamp(edge, 1 - edge).logit()
    bent = shift + log_slope.exp() * logit
    log_rise = log_slope + _log_density(bent) - _log_density(logit)
    return bent.sigmoid().clamp(edge, 1 - edge), log_rise


def unbend(bent: Tensor, shift: Tensor, log_slope: Tensor) -> Tensor:
    """The u that `bend` takes there."""
    edge = torch.finfo(bent.dtype).eps
    logit = bent.clamp(edge, 1 - edge).logit()
    return ((logit - shift) * (-log_slope).exp()).sigmoid()


def _log_density(x: Tensor) -> Tensor:
    """log of σ(x)·(1 - σ(x)), the logistic density."""
    return F.logsigmoid(x) + F.logsigmoid(-x)
