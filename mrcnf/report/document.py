"""A page that needs nothing beside itself: sections of text, tables, charts and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import jinja2
from torch import Tensor

from mrcnf.report import inline


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str
    aside: bool = False
    """Whether it says why something is missing."""
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first cell of each being what the row is about."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    strong: Sequence[int] = ()
    """Rows that stand out."""
    words: Sequence[int] = ()
    """Columns of words beside the first; the others hold numbers."""
    swatches: Sequence[Swatch] = ()
    """For each row, how figures draw what it is about."""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Swatch:
    """How a figure draws one of several things."""

    name: str
    colour: str
    line: str = "-"
    """As matplotlib calls it."""
    marker: str = ""

    @property
    def border(self) -> str:
        """The line as CSS calls it."""
        return {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashed"}[self.line]

    @property
    def ink(self) -> str:
        """The colour as CSS calls it; black is the text's, which is light in the dark."""
        return "currentColor" if self.colour == "#000000" else self.colour


@dataclass(frozen=True)
class Chart:
    """Panels of lines, from `inline.panel`, with what their colours mean."""

    panels: Sequence[str]
    caption: str
    legend: Sequence[Swatch] = ()
    kind: ClassVar[str] = "chart"


@dataclass(frozen=True)
class Picture:
    """Images in rows and columns.

    Args:
        images: uint8 (N, C, H, W), row by row.
        columns: images per row.
        alt: what a reader learns who does not see it.
        heads: what stands above each column.
    """

    images: Tensor
    columns: int
    alt: str
    caption: str
    heads: Sequence[str] = ()
    kind: ClassVar[str] = "picture"

    @property
    def placed(self) -> tuple[str, int, int]:
        """Address, width and height: see `inline.png`."""
        return inline.png(self.images, self.columns)


@dataclass(frozen=True)
class Code:
    """Lines of a file or commands, word for word."""

    lines: str
    title: str = ""
    """Where there is one, the lines are folded away behind it."""
    kind: ClassVar[str] = "code"


Block = Text | Table | Chart | Picture | Code


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading of its own."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    kicker: str
    """What kind of page it is, above the title."""
    number: str = ""
    """The one that matters."""
    unit: str = ""
    about: str = ""
    """What the number says."""
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    """What a reader must know first."""
    sections: Sequence[Section] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as HTML: styles, figures and pictures inside, no scripts."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mrcnf.report"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("page.html").render(page=page)
