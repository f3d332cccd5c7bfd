"""Every figure: image grids, upscaling panels, training curves."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mrcnf import files
from mrcnf.errors import UserError
from mrcnf.runs import checkpoint, metrics

BACKGROUND = 255


def grid(images: Tensor, columns: int = 0, gap: int = 2, zoom: int = 1) -> Tensor:
    """Tile uint8 (N, C, H, W) into one image (C, ·, ·), row by row on white.

    Args:
        columns: images per row; 0 makes the grid as square as possible.
        gap: pixels between images, after zooming.
        zoom: show each pixel as a square of this side.
    """
    images = enlarge(images.cpu(), zoom)
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), BACKGROUND,
                        dtype=torch.uint8)  # fmt: skip
    for i, image in enumerate(images):
        top = gap + (i // columns) * (h + gap)
        left = gap + (i % columns) * (w + gap)
        canvas[:, top : top + h, left : left + w] = image
    return canvas


def enlarge(images: Tensor, zoom: int) -> Tensor:
    """Repeat every pixel zoom × zoom times."""
    return images.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)


def upscaling_panel(
    path: Path,
    inputs: Tensor,
    draws: Tensor,
    truth: Tensor | None = None,
    *,
    zoom: int = 3,
) -> None:
    """A row per image: the input, nearest-neighbour enlarged; draws; the truth if known.

    Args:
        inputs: uint8 (N, C, r, r).
        draws: uint8 (K, N, C, R, R).
        truth: uint8 (N, C, R, R).
    """
    factor = draws.shape[-1] // inputs.shape[-1]
    cells: list[Tensor] = [enlarge(inputs.cpu(), factor), *draws.cpu()]
    titles = [f"input {inputs.shape[-1]}×{inputs.shape[-1]}"]
    titles += [f"draw {k + 1}" for k in range(len(draws))]
    if truth is not None:
        cells.append(truth.cpu())
        titles.append("truth")
    rows, columns = len(inputs), len(cells)
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1.3 * columns, 1.3 * rows + 0.3), squeeze=False
    )
    for row in range(rows):
        for column in range(columns):
            axis = axes[row][column]
            picture = enlarge(cells[column][row], zoom).permute(1, 2, 0).numpy()
            grey = picture.shape[2] == 1
            axis.imshow(picture[..., 0] if grey else picture, cmap="gray" if grey else None,
                        vmin=0, vmax=255, interpolation="nearest")  # fmt: skip
            axis.axis("off")
            if row == 0:
                axis.set_title(titles[column], fontsize=9)
    figure.tight_layout(pad=0.4)
    _save(figure, path)


def training_curves(path: Path, run: Path) -> None:
    """The loss of every level of a run against training time in minutes."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for resolution, folder in checkpoint.find_levels(run).items():
        rows = [row for row in metrics.read(folder) if "loss" in row]
        minutes = [row["seconds"] / 60 for row in rows]
        axis.plot(minutes, smooth([row["loss"] for row in rows]), label=f"level {resolution}")
    axis.set_xlabel("training time [min]")
    axis.set_ylabel("loss (running mean)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    _save(figure, path)


def bpd_curves(path: Path, runs: Sequence[Path]) -> None:
    """Bits/dim on test images against training time, a panel per level, a line per run."""
    pyplot = _pyplot()
    curves = [
        (resolution, run.name, curve)
        for run in runs
        for resolution, folder in checkpoint.find_levels(run).items()
        if (curve := metrics.read_curve(folder))
    ]
    if not curves:
        raise UserError("none of these runs has a test curve; train with train.evaluate_every=500")
    levels = sorted({resolution for resolution, _, _ in curves})
    figure, axes = pyplot.subplots(
        1, len(levels), figsize=(1 + 3.6 * len(levels), 3.4), squeeze=False
    )
    for axis, level in zip(axes[0], levels, strict=True):
        for resolution, name, curve in curves:
            if resolution == level:
                minutes = [row["seconds"] / 60 for row in curve]
                axis.plot(minutes, [row["test_bpd"] for row in curve], "o-", ms=3, label=name)
        axis.set_title(f"level {level}", fontsize=10)
        axis.set_xlabel("training time [min]")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the test bits/dim")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def smooth(values: Sequence[float], decay: float = 0.8) -> list[float]:
    """Exponential running mean, without the bias of its start."""
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        out.append(total / weight)
    return out


def _pyplot():  # type: ignore[no-untyped-def]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: Path) -> None:  # type: ignore[no-untyped-def]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    _pyplot().close(figure)
    files.write(path, buffer.getvalue())
