"""Coding without a model and without bits to begin with: the first images of a file.

The S-transform takes an image to coarser and coarser ones (`haar.lift`). Details are coded from
what the coarse image is like around them: it says which sign they are likely to have and how
large they may be, the more so if the other bands and the first colour are known. The colours of
details are luma and two differences (YCoCg-R; Malvar & Sullivan 2003), the distributions those of
Laplace. All of it is in whole numbers; the weights are fitted to small photographs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrcnf.codec import tables
from mrcnf.codec.ans import CodingError, Stack
from mrcnf.codec.tables import OCTAVE
from mrcnf.image import haar

# Log₂ of a detail's mean size, in 64ths: a start, for the finest level and the others, and weights
# (in 64ths, too) of log₂(1 + ·) of: how much the coarse image varies there, in this colour and in
# luma; the luma of the same band; the same colour in the bands before.
_LUMA = (((-40, 22), (52, 0, 0)), ((-59, -6), (52, 0, 0, 3)), ((-69, -19), (40, 0, 0, 13, 19)))
_CHROMA = (
    ((-85, -61), (55, -10, 16)),
    ((-88, -66), (49, -8, 18, 5)),
    ((-93, -81), (34, -2, 10, 15, 19)),
)

_LARGEST = 1024
"""More than any detail of 8-bit images in any colour differs from its mean: 510 and 255."""


def push_image(stack: Stack, images: Tensor, depth: int = 0) -> None:
    """Push images (N, C, H, W), int64, of 8 bits.

    Args:
        depth: how many times they are coarser than the finest.
    """
    if images.shape[2] % 2 or images.shape[3] % 2:
        stack.push_uniform(images.numpy(), 8)
        return
    detail, coarse = haar.lift(images)
    push_detail(stack, detail, coarse, depth)
    push_image(stack, coarse, depth + 1)


def pop_image(stack: Stack, shape: tuple[int, int, int, int], depth: int = 0) -> Tensor:
    """Pop what `push_image` pushed.

    Raises:
        CodingError: it did not push this.
    """
    n, c, h, w = shape
    if h % 2 or w % 2:
        return torch.from_numpy(stack.pop_uniform(shape, 8))
    coarse = pop_image(stack, (n, c, h // 2, w // 2), depth + 1)
    images = haar.unlift(pop_detail(stack, coarse, depth), coarse)
    if images.min() < 0 or images.max() > 255:
        raise CodingError("pixels out of their range")
    return images


def push_detail(stack: Stack, detail: Tensor, coarse: Tensor, depth: int) -> None:
    """Push details (N, 3C, H, W), integers, given their coarse image (N, C, H, W)."""
    context = _Context(coarse, depth)
    bands = [_colours(band) for band in detail.chunk(3, 1)]
    todo = []
    for band, colour in context.order():
        mean, index = context.of(band, colour)
        value = bands[band][:, colour]
        todo.append((value - mean, index))
        context.know(band, colour, value - mean)
    for value, index in reversed(todo):
        stack.push_laplace(value.numpy(), index.numpy())


def pop_detail(stack: Stack, coarse: Tensor, depth: int) -> Tensor:
    """Pop what `push_detail` pushed.

    Raises:
        CodingError: it did not push this.
    """
    context = _Context(coarse, depth)
    bands: list[list[Tensor]] = [[], [], []]
    for band, colour in context.order():
        mean, index = context.of(band, colour)
        value = torch.from_numpy(stack.pop_laplace(index.numpy()))
        if value.min() < -_LARGEST or value.max() > _LARGEST:
            raise CodingError("a detail that no image has")
        bands[band].append(value + mean)
        context.know(band, colour, value)
    return torch.cat([_pixels(torch.stack(found, 1)) for found in bands], 1)


class _Context:
    """What is known when a detail is coded."""

    def __init__(self, coarse: Tensor, depth: int) -> None:
        self.coarse, self.deep = _colours(coarse), int(depth > 0)
        self.colours = self.coarse.shape[1]
        around = F.pad(self.coarse.double(), (1, 1, 1, 1), mode="replicate").long()
        h, w = coarse.shape[2:]
        shifted = {
            (i, j): around[:, :, 1 + i : 1 + i + h, 1 + j : 1 + j + w]
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        }
        self.means = (
            (shifted[-1, 0] - shifted[1, 0]) >> 2,
            (shifted[0, -1] - shifted[0, 1]) >> 2,
            torch.zeros_like(self.coarse),
        )
        # Eighths of the differences to the four nearest, and half of that to the diagonal ones.
        total = sum(
            (2 if not i * j else 1) * (near - self.coarse).abs()
            for (i, j), near in shifted.items()
        )
        assert isinstance(total, Tensor)
        self.activity = _logarithms(total >> 3)
        self.sizes: dict[tuple[int, int], Tensor] = {}

    def order(self) -> Iterator[tuple[int, int]]:
        """Bands and colours, in the order in which they get to be known."""
        return ((band, colour) for band in range(3) for colour in range(self.colours))

    def of(self, band: int, colour: int) -> tuple[Tensor, Tensor]:
        """The mean of a detail, and the index of the distribution of what it differs by."""
        starts, weights = (_CHROMA if colour else _LUMA)[band]
        own, luma, first, *before = weights
        size = OCTAVE * starts[self.deep] + own * self.activity[:, colour]
        size = size + luma * self.activity[:, 0]
        if colour:
            size = size + first * self.sizes[band, 0]
        for earlier, weight in enumerate(before):
            size = size + weight * self.sizes[earlier, colour]
        eighths = (size * 8) // OCTAVE**2 + 32
        return self.means[band][:, colour], eighths.clamp(0, tables.LAPLACES - 1)

    def know(self, band: int, colour: int, residual: Tensor) -> None:
        self.sizes[band, colour] = _logarithms(residual.abs())


def _colours(x: Tensor) -> Tensor:
    """Red, green and blue to luma and two differences, integers to integers; grey stays."""
    if x.shape[1] != 3:
        return x
    red, green, blue = x.unbind(1)
    orange = red - blue
    middle = blue + (orange >> 1)
    rest = green - middle
    return torch.stack((middle + (rest >> 1), orange, rest), 1)


def _pixels(x: Tensor) -> Tensor:
    """The inverse of `_colours`."""
    if x.shape[1] != 3:
        return x
    luma, orange, rest = x.unbind(1)
    middle = luma - (rest >> 1)
    blue = middle - (orange >> 1)
    return torch.stack((blue + orange, rest + middle, blue), 1)


def _logarithms(values: Tensor) -> Tensor:
    """64·log₂(1 + ·), rounded, of integers ≥ 0."""
    found, places = np.unique(values.numpy(), return_inverse=True)
    table = np.array([tables.logarithm(int(value)) for value in found], np.int64)
    return torch.from_numpy(table[places].reshape(values.shape))
