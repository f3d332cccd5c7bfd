"""The paper's velocity network."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mrcnf.flows.tangents import Dual
from mrcnf.flows.velocity import Field


class PaperField(Field):
    """The paper's network: 3×3 convolutions with softplus, time at every layer.

    Time enters as a constant extra channel (the first of each layer's weights), the coarse
    image as further channels of the first layer; the last layer starts at zero. A constant
    channel t through a zero-padded convolution is t times a fixed map, and that map is what
    is added here. 79,134 parameters for a base block of three channels, 87,834 for a detail
    block (arXiv 2106.08462, appendix; the sizes of its tables).

    Args:
        channels: of y.
        coarse_channels: of the coarse image, 0 for a base level.
        hidden: widths of the hidden layers.
    """

    def __init__(
        self, channels: int, coarse_channels: int = 0, hidden: tuple[int, ...] = (64, 64, 64)
    ) -> None:
        super().__init__()
        widths = (channels + coarse_channels, *hidden, channels)
        self.layers = nn.ModuleList(
            nn.Conv2d(1 + before, after, 3, padding=1)
            for before, after in pairwise(widths)
        )
        last = self.layers[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def hidden_weights(self) -> list[nn.Parameter]:
        return [layer.weight for layer in self.layers[1:-1]]  # type: ignore[misc]

    def run(self, t: Tensor, y: Dual, context: Tensor | None) -> Dual:
        value, tangents = y.value, y.tangents
        n, clock = len(value), t.reshape(-1, 1, 1, 1).to(value.dtype)
        ones = value.new_ones(1, 1, *value.shape[2:])
        h = value if tangents is None else torch.cat((value, tangents.flatten(0, 1)))
        h = h.contiguous(memory_format=torch.channels_last)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            w_time, weight, w_coarse = layer.weight.split(
                (1, h.shape[1], layer.in_channels - 1 - h.shape[1]), dim=1
            )
            time_map = F.conv2d(ones, w_time, padding=1)
            bias = torch.addcmul(layer.bias[:, None, None], clock, time_map)
            if i == 0 and context is not None:
                bias = bias + F.conv2d(context, w_coarse, padding=1)
            h = F.conv2d(h, weight, padding=1)
            if i < len(self.layers) - 1:
                h = F.softplus(h + bias) if tangents is None else _SoftplusPair.apply(h, bias, n)
        return Dual(h[:n] + bias, None if tangents is None else h[n:].unflatten(0, (-1, n)))


class _SoftplusPair(torch.autograd.Function):
    """softplus(h + bias) over the first n rows, its slope times the other K·n: one pass each way.

    Saves the slope alone instead of what softplus, sigmoid and a product would, and spares
    their backward passes and those of slices.
    """

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, bias: Tensor, n: int) -> Tensor:
        h, tangents = stacked[:n] + bias, stacked[n:].unflatten(0, (-1, n))
        slope = torch.sigmoid(h)
        ctx.save_for_backward(slope, tangents)
        ctx.bias_shape = bias.shape
        return torch.cat((F.softplus(h), (slope * tangents).flatten(0, 1)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        slope, tangents = ctx.saved_tensors
        value, pushed = grad[: len(slope)], grad[len(slope) :].unflatten(0, tangents.shape[:2])
        bent = slope * torch.addcmul(value, 1 - slope, (pushed * tangents).sum(0))
        stacked = torch.cat((bent, (slope * pushed).flatten(0, 1)))
        return stacked, bent.sum_to_size(ctx.bias_shape), None
