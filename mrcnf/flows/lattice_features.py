"""Features that show a network where on the lattice of integers each pixel is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mrcnf.flows import paths
from mrcnf.flows.tangents import Dual, mix


class Lattice(nn.Module):
    """sin and cos of the pixels' phases on the lattice of integers, for as long as noise lets it
    be seen.

    Dequantised pixels crowd around the lattice's points (Gaussian noise) or break off halfway
    between them (uniform noise); a convolution of values that span 256 points cannot tell
    where it is on that scale (Kingma et al. 2021, appendix C, feed Fourier features of pixels
    for the same reason). The pixels are those that y_t/α and the coarse image make together;
    noise of phase variance s² leaves exp(-s²/2) of a phase's sin and cos to be known, and that
    is what they are multiplied by.
    """

    of_y: Tensor
    of_coarse: Tensor
    offset: Tensor

    def __init__(self, channels: int, coarse_channels: int, pixels: int) -> None:
        super().__init__()
        self.register_buffer("of_y", torch.zeros(pixels, channels))
        self.register_buffer("of_coarse", torch.zeros(pixels, coarse_channels))
        self.register_buffer("offset", torch.zeros(pixels, 1, 1))

    def calibrate(self, cells: Tensor) -> None:
        sizes = [self.of_y.shape[1], self.of_coarse.shape[1], 1]
        of_y, of_coarse, offset = (2 * math.pi * cells).split(sizes, dim=1)
        self.of_y.copy_(of_y)
        self.of_coarse.copy_(of_coarse)
        self.offset.copy_(offset[..., None])

    def forward(self, path: paths.Path, y: Dual, coarse: Tensor | None) -> Dual:
        shrunk = path.alpha.clamp_min(0.1)  # what follows is 0 long before
        phase = y.scale(1 / shrunk).linear(lambda x: mix(self.of_y, x), self.offset)
        if coarse is not None:
            phase = phase.shift(mix(self.of_coarse, coarse))
        seen = (-mix(self.of_y**2, (path.beta / shrunk) ** 2) / 2).exp()
        sin, cos = seen * phase.value.sin(), seen * phase.value.cos()
        return phase.map(sin, lambda: cos).cat(phase.map(cos, lambda: -sin))
