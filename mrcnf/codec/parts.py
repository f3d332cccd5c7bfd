"""Which parts photographs are coded in.

A file begins with nothing on its stack, and a block pops some ten times as many bits as its images
will have added (`ramp`). So a photograph is cut: first into parts of the size that levels are
trained on, then into larger ones, and what comes late in a file is whole. A part is an image of its
own to the networks, which see nothing beyond its edges; that costs bits along them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from mrcnf.codec.ans import CodingError
from mrcnf.codec.blocks import Size

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Rule:
    """How images are cut, one after another; a file says with which numbers."""

    unit: int
    """Parts begin at multiples of it; none of fewer than 2·unit² pixels is cut further."""
    ratio: int = 8
    """A part has at most so many times fewer pixels than are coded before it, unless it is of
    the smallest."""
    most: int = 1 << 16
    """Pixels of a part, unless it is of the smallest."""

    SMALLEST = 32

    @classmethod
    def of(cls, multiple: int) -> Rule:
        """The rule for a model, whose images' sides are multiples of `multiple`."""
        return cls(max(cls.SMALLEST, multiple))

    def table(self) -> list[int]:
        """As plain JSON."""
        return list(astuple(self))

    @classmethod
    def from_table(cls, table: Mapping[str, Any], multiple: int) -> Rule | None:
        """The rule that a file's settings give; None: its images are whole.

        Raises:
            CodingError: it is none for images of this multiple.
        """
        found = table.get(KEY)
        if found is None:
            return None
        if not isinstance(found, list) or len(found) != 3:
            raise CodingError("no rule for parts")
        if any(type(x) is not int or not 0 < x < 1 << 40 for x in found):
            raise CodingError("no rule for parts")
        # Smaller ones could be so many that a short file would keep its reader busy for hours.
        if found[0] < cls.SMALLEST or found[0] % multiple:
            raise CodingError("no rule for parts of its images")
        return cls(*found)


KEY = "parts"
"""Of the rule in a file's settings."""


@dataclass(frozen=True)
class Part:
    """A rectangle of an image."""

    image: int
    top: int
    left: int
    size: Size

    def of(self, image: Tensor) -> Tensor:
        """Its pixels of its image (C, H, W)."""
        return image[
            :, self.top : self.top + self.size.height, self.left : self.left + self.size.width
        ]


def cut(sizes: Sequence[Size], rule: Rule | None) -> list[Part]:
    """The parts of images of these sizes, in the order in which they are coded."""
    found, before = list[Part](), 0
    for i, size in enumerate(sizes):
        whole = Part(i, 0, 0, size)
        for part in [whole] if rule is None else _cut(whole, rule, before):
            found.append(part)
            before += part.size.height * part.size.width
    return found


def _cut(part: Part, rule: Rule, before: int) -> Iterator[Part]:
    """A part cut until its pieces are small enough, so many pixels before them."""
    height, width = part.size.height, part.size.width
    pixels = height * width
    longer = max(height, width)
    smallest = longer < 2 * rule.unit or pixels < 2 * rule.unit**2
    if smallest or (pixels <= rule.most and rule.ratio * pixels <= before):
        yield part
        return
    half = (longer + rule.unit) // (2 * rule.unit) * rule.unit
    top, left = part.top, part.left
    if height == longer:
        one = Part(part.image, top, left, Size(half, width))
        other = Part(part.image, top + half, left, Size(height - half, width))
    else:
        one = Part(part.image, top, left, Size(height, half))
        other = Part(part.image, top, left + half, Size(height, width - half))
    yield from _cut(one, rule, before)
    yield from _cut(other, rule, before + one.size.height * one.size.width)


def join(
    found: Iterable[tuple[Part, Tensor]], shapes: Sequence[Shape], factor: int
) -> list[Tensor]:
    """Images (C, H, W) of these shapes from all of their parts.

    Args:
        factor: by which images and parts are smaller than places and sizes say.
    """
    images: list[Tensor | None] = [None] * len(shapes)
    for part, pixels in found:
        image = images[part.image]
        if image is None:
            image = images[part.image] = torch.empty(shapes[part.image], dtype=pixels.dtype)
        top, left = part.top // factor, part.left // factor
        _, height, width = pixels.shape
        image[:, top : top + height, left : left + width] = pixels
    return [image for image in images if image is not None]
