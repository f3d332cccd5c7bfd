"""Which images are coded together, and what each of them is on the way to the networks and back.

Images of one size go through the networks in blocks, see `ramp` for how large these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mrcnf.codec.ans import CodingError

MOST_PIXELS = 32 * 32 * 32
"""Of all images in a block, unless it is a single one."""


@dataclass(frozen=True)
class Size:
    """Height and width of an image."""

    height: int
    width: int

    def padded(self, unit: int) -> Size:
        """The next multiples of a unit."""
        return Size(self.height + -self.height % unit, self.width + -self.width % unit)

    def reduced(self, factor: int) -> Size:
        """So many times smaller, what is left over counted as one."""
        return Size(-(-self.height // factor), -(-self.width // factor))


@dataclass(frozen=True)
class Block:
    """Images that go through the networks together."""

    members: tuple[int, ...]
    """Their places among the images that are coded."""
    size: Size
    """Of all of them, padded."""

    @property
    def pixels(self) -> int:
        """Of all of them, padding included."""
        return len(self.members) * self.size.height * self.size.width

    def first(self, count: int) -> Block:
        """The first so many of them."""
        return Block(self.members[:count], self.size)


@dataclass(frozen=True)
class Group:
    """All images that may be coded together."""

    members: tuple[int, ...]
    """Their places among the images that are coded."""
    size: Size
    """Of all of them, padded."""

    @property
    def most(self) -> int:
        """Images in a block, at most."""
        return max(1, MOST_PIXELS // (self.size.height * self.size.width))


def groups(sizes: Sequence[Size], unit: int) -> list[Group]:
    """Images of these sizes by what these are when they are padded to multiples of a unit."""
    found: dict[Size, list[int]] = {}
    for i, size in enumerate(sizes):
        found.setdefault(size.padded(unit), []).append(i)
    return [Group(tuple(members), size) for size, members in found.items()]


def cut(found: Sequence[Group], counts: Sequence[int]) -> list[Block]:
    """The groups' images in blocks of given numbers of images.

    Raises:
        CodingError: the blocks are not those of the groups.
    """
    blocks, left = list[Block](), list(counts)
    for group in found:
        start = 0
        while start < len(group.members):
            if not left or not 0 < left[0] <= min(group.most, len(group.members) - start):
                raise CodingError("its blocks are not those of its images")
            end = start + left.pop(0)
            blocks.append(Block(group.members[start:end], group.size))
            start = end
    if left:
        raise CodingError("its blocks are not those of its images")
    return blocks


def gather(images: Sequence[Tensor], block: Block, channels: int) -> Tensor:
    """A block's images, uint8 (C, H, W) each, as the model has them: int64 (N, channels, H, W).

    Grey images are three equal channels of a model of colours. Heights and widths are made up by
    repeating the last row and column.
    """
    return torch.stack([_padded(images[i], block.size, channels) for i in block.members]).long()


def scatter(
    decoded: Tensor, block: Block, sizes: Sequence[Size], channels: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """The inverse of `gather`: the places of a block's images, and these, uint8 (C, H, W)."""
    for i, image in zip(block.members, decoded.to(torch.uint8), strict=True):
        yield i, image[: channels[i], : sizes[i].height, : sizes[i].width].clone()


def _padded(image: Tensor, size: Size, channels: int) -> Tensor:
    _, height, width = image.shape
    missing = (0, size.width - width, 0, size.height - height)
    padded = F.pad(image[None].float(), missing, mode="replicate")[0]
    return padded.expand(channels, -1, -1)
