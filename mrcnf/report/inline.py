"""Figures and pictures as parts of a page: SVG in the page's own colours and letters, PNG."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mrcnf.image.grid import grid

COLUMN = 680
"""Width of a page's column in CSS pixels, which pictures fill as far as whole zooms go."""
PANEL = 3.3, 2.3
"""Width and height of a panel in inches: two beside each other fill the column, one a phone."""
_MARGINS = {"left": 0.18, "right": 0.98, "bottom": 0.2, "top": 0.9}
_INK = "#010203"  # stands for the colour of the page's text while matplotlib draws
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "mrcnf",
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9,
    "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "text.color": _INK, "axes.labelcolor": _INK, "axes.titlecolor": _INK, "axes.edgecolor": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "grid.color": _INK, "grid.alpha": 0.15,
    "grid.linewidth": 0.5, "axes.grid": True, "axes.axisbelow": True, "lines.linewidth": 1.4,
}  # fmt: skip


def panel(paint: Callable[[Any], None], alt: str, *, title: str, across: str, up: str) -> str:
    """One panel of a chart as an SVG element of a page.

    Args:
        paint: draws onto matplotlib's axes.
        alt: what a reader learns who does not see it.
        title, across, up: what stands above the panel and at its axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        # Margins of their own would take most of the time.
        figure, axis = pyplot.subplots(figsize=PANEL, gridspec_kw=_MARGINS)
        paint(axis)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_xlabel(across)
        axis.set_ylabel(up)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    return _element(buffer.getvalue(), alt)


def _element(document: str, alt: str) -> str:
    """An SVG document as an element: colours of the page, identifiers that meet no others."""
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    own = hashlib.sha256(body.encode()).hexdigest()[:8]
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>f{own}-", body)
    for ink in (_INK, "#000000"):  # the palette's black, too, must be seen in the dark
        body = body.replace(ink, "currentColor")
    size = re.search(r'viewBox="[^"]*"', body)
    assert size is not None  # matplotlib writes it
    inside = body[body.index(">") + 1 :].replace("xlink:href", "href")
    return f'<svg {size[0]} role="img" aria-label="{escape(alt)}">{inside.strip()}'


def png(images: Tensor, columns: int) -> tuple[str, int, int]:
    """Images tiled into one PNG whose gaps are transparent, as a page embeds it.

    Args:
        images: uint8 (N, C, H, W), C being 1 or 3.
        columns: images per row.

    Returns:
        a `data:` address; width and height at which to show it, in CSS pixels: as many whole
        times its own as fit into the column, or fewer than its own.
    """
    gaps = grid(torch.zeros_like(images[:, :1]), columns, gap=1)
    canvas = torch.cat((grid(images, columns, gap=1), 255 - gaps))
    array = canvas.permute(1, 2, 0).contiguous().numpy()
    picture, buffer = Image.fromarray(array, {2: "LA", 4: "RGBA"}[array.shape[2]]), io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    zoom = max(1, COLUMN // picture.width)
    return f"data:image/png;base64,{data}", zoom * picture.width, zoom * picture.height
