"""Every figure: upscaling panels, training curves, entropies, attacks, scores, runs beside each
other.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mrcnf import files
from mrcnf.errors import UserError
from mrcnf.image.grid import enlarge
from mrcnf.measure.entropy import NORMAL, SplitEntropy
from mrcnf.measure.ood import Detection
from mrcnf.measure.robustness import Row
from mrcnf.report import compare
from mrcnf.runs import checkpoint, metrics

FORMATS = (".png", ".pdf", ".svg")
"""What the name of a figure's file may end in; it says the format."""
DPI = 130
PICTURE = 169, 640
"""A panel's pictures in dots: the longer side is at least, and at most, so long."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
"""The colour-blind-safe palette of Okabe and Ito (2008), what stands out most on white first."""
MARKERS, LINES = "osD^vP", ("-", "--", ":", "-.")
TRAINING_TIME = "training time [min]"


def upscaling_panel(
    path: Path, inputs: Tensor, draws: Tensor, truth: Tensor | None = None
) -> None:
    """A row per image: the input, nearest-neighbour enlarged; draws; the truth if known.

    Args:
        inputs: uint8 (N, C, h, w).
        draws: uint8 (K, N, C, f·h, f·w) for a whole f.
        truth: uint8 (N, C, f·h, f·w).
    """
    factor = draws.shape[-1] // inputs.shape[-1]
    cells: list[Tensor] = [enlarge(inputs.cpu(), factor), *draws.cpu()]
    titles = [f"input {inputs.shape[-1]}×{inputs.shape[-2]}"]
    titles += [f"draw {k + 1}" for k in range(len(draws))]
    if truth is not None:
        cells.append(truth.cpu())
        titles.append("truth")
    figure, axes = _picture_axes(len(inputs), len(cells), *draws.shape[-2:])
    for column, pictures in enumerate(cells):
        axes[0][column].set_title(titles[column], fontsize=9)
        for axis, picture in zip(axes[:, column], pictures, strict=True):
            _show(axis, picture)
    _save(figure, path)


def _picture_axes(rows: int, columns: int, height: int, width: int):  # type: ignore[no-untyped-def]
    """Axes for pictures of height × width pixels, each a square of whole dots if it can be."""
    longer = max(height, width)
    zoom = max(1, math.ceil(PICTURE[0] / longer)) if longer <= PICTURE[1] else PICTURE[1] / longer
    gap, title, narrowest = 8, 26, 100  # dots; a title needs its width
    tall, wide = zoom * height, max(zoom * width, narrowest)
    down, across = rows * (tall + gap) + title, columns * (wide + gap) + gap
    place = {
        "left": gap / across,
        "right": 1 - gap / across,
        "bottom": gap / down,
        "top": 1 - title / down,
        "wspace": gap / wide,
        "hspace": gap / tall,
    }
    size = across / DPI, down / DPI
    return _pyplot().subplots(
        rows, columns, figsize=size, dpi=DPI, squeeze=False, gridspec_kw=place
    )


def _show(axis, image: Tensor) -> None:  # type: ignore[no-untyped-def]
    """An image, uint8 (C, H, W): its pixels where it is enlarged, their means where it shrinks."""
    pixels = image.permute(1, 2, 0).numpy()
    axis.imshow(pixels.squeeze(2) if len(image) == 1 else pixels, cmap="gray", vmin=0, vmax=255,
                interpolation="antialiased")  # fmt: skip
    axis.axis("off")


def training_curves(path: Path, run: Path) -> None:
    """The loss of every level of a run against training time in minutes."""
    figure, axis = _pyplot().subplots(figsize=(6, 3.6), layout="constrained")
    for i, (resolution, folder) in enumerate(checkpoint.find_levels(run).items()):
        draw_loss(axis, metrics.read(folder), label=f"level {resolution}", **line_style(i))
    axis.set_xlabel(TRAINING_TIME)
    axis.set_ylabel("loss (running mean)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    _save(figure, path)


def draw_loss(axis, rows: Sequence[Mapping[str, float]], **style: str) -> None:  # type: ignore[no-untyped-def]
    """The running mean of a level's loss against training time, from the lines of its log."""
    rows = [row for row in rows if "loss" in row]
    minutes = [row["seconds"] / 60 for row in rows]
    axis.plot(minutes, smooth([row["loss"] for row in rows]), **{**style, "marker": ""})


def draw_bits(axis, curve: Sequence[Mapping[str, float]], **style: str):  # type: ignore[no-untyped-def]
    """A level's share of the test bits/dim against training time; returns the line."""
    minutes, bits = zip(*((row["seconds"] / 60, row["test_bpd"]) for row in curve), strict=True)
    (line,) = axis.plot(minutes, bits, ms=3, **style)
    return line


def bpd_curves(path: Path, runs: Sequence[Path]) -> None:
    """Bits/dim on test images against training time, a panel per level, a line per run.

    A run looks the same in all panels, whichever of the levels it has.

    Raises:
        UserError: no run has such a curve.
    """
    curves = [
        (resolution, i, curve)
        for i, run in enumerate(runs)
        for resolution, folder in checkpoint.find_levels(run).items()
        if (curve := metrics.read_curve(folder))
    ]
    if not curves:
        raise UserError(
            "none of these runs has a test curve; train with train.evaluate_every=500, or fewer "
            "steps where training is short"
        )
    levels = sorted({resolution for resolution, _, _ in curves})
    names = compare.labels(runs)
    # In inches; the legend takes what is beside the panels.
    size = 3.6 * len(levels) + 0.6 + 0.07 * max(map(len, names)), max(3.4, 0.18 * len(runs))
    figure, axes = _pyplot().subplots(
        1, len(levels), figsize=size, squeeze=False, layout="constrained"
    )
    handles = {}
    for resolution, i, curve in curves:
        axis = axes[0][levels.index(resolution)]
        handles[i] = draw_bits(axis, curve, label=names[i], **line_style(i))
    for axis, level in zip(axes[0], levels, strict=True):
        axis.set_title(f"level {level}", fontsize=10)
        axis.set_xlabel(TRAINING_TIME)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the test bits/dim")
    shown = [handles[i] for i in sorted(handles)]
    figure.legend(handles=shown, loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)


def split_entropies(path: Path, runs: Mapping[str, Sequence[SplitEntropy]]) -> None:
    """Entropies of the channels that stay and leave, a panel for each split, runs side by side.

    A point is a channel, a bar the mean of those beside it; the broken line is the entropy of a
    standard normal number.
    """
    keys = list(dict.fromkeys((s.resolution, s.split) for splits in runs.values() for s in splits))
    size = (1.2 + 0.9 * len(runs)) * len(keys), 3.6
    figure, axes = _pyplot().subplots(
        1, len(keys), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for axis, key in zip(axes[0], keys, strict=True):
        axis.axhline(NORMAL, color="0.5", linestyle="--", linewidth=1)
        for x, splits in enumerate(runs.values()):
            for split in splits:
                if (split.resolution, split.split) == key:
                    _channels(axis, x - 0.16, split.stays, COLOURS[0], "stays")
                    _channels(axis, x + 0.16, split.leaves, COLOURS[1], "leaves")
        axis.set_title(f"level {key[0]}, split {key[1]}", fontsize=10)
        axis.set_xticks(range(len(runs)), list(runs), fontsize=8)
        axis.grid(alpha=0.3, axis="y")
    axes[0][0].set_ylabel("entropy of a channel [nats]")
    handles, labels = axes[0][0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named, loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)


def _channels(axis, x: float, values: Sequence[float], colour: str, label: str) -> None:  # type: ignore[no-untyped-def]
    axis.plot([x] * len(values), values, "o", ms=3, alpha=0.5, color=colour, label=label)
    mean = sum(values) / len(values)
    axis.plot([x - 0.11, x + 0.11], [mean, mean], color=colour, linewidth=2)


def attack_curves(path: Path, rows: Sequence[Row]) -> None:
    """Bits/dim against the steps of the attack, a line for every ε; broken: random signs.

    Args:
        rows: with their `curve`.
    """
    figure, axis = _pyplot().subplots(figsize=(6, 3.8), layout="constrained")
    for i, row in enumerate(rows):
        steps = [0, *(point["steps"] for point in row.curve)]
        bits = [row.natural, *(point["attacked"] for point in row.curve)]
        errors = [row.natural_stderr, *(point["attacked_stderr"] for point in row.curve)]
        axis.errorbar(steps, bits, errors, ms=4, capsize=2, label=f"ε = {row.epsilon}",
                      **line_style(i))  # fmt: skip
        axis.axhline(row.random, color=line_style(i)["color"], linestyle=":", linewidth=1)
    axis.set_xlabel("steps of the attack (dotted: random signs)")
    axis.set_ylabel("bits/dim")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def score_histograms(path: Path, found: Detection) -> None:
    """How every score is distributed on the two sets of images, a panel for each score."""
    size = 3.2 * len(found.auroc), 3.2
    figure, axes = _pyplot().subplots(
        1, len(found.auroc), figsize=size, squeeze=False, layout="constrained"
    )
    for axis, (score, area) in zip(axes[0], found.auroc.items(), strict=True):
        counts = found.histograms[score]
        for i, (side, name) in enumerate((("inside", found.data), ("outside", found.against))):
            axis.stairs(counts[side], counts["edges"], fill=True, alpha=0.5, color=COLOURS[i],
                        label=name)  # fmt: skip
        axis.set_title(f"{score}: AUROC {area:.3f}", fontsize=10)
        axis.set_xlabel("score [bits/dim]")
    axes[0][0].set_ylabel("images")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=8, ncols=2)
    _save(figure, path)


def line_style(i: int) -> dict[str, str]:
    """How the i-th of several things that a figure compares is drawn, as arguments of `plot`.

    The first eight differ in colour; then markers and line styles change too.
    """
    again = i // len(COLOURS)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[again % len(MARKERS)],
        "linestyle": LINES[again % len(LINES)],
    }


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


def check_figure(path: Path) -> None:
    """A UserError unless a name ends in a format of figures."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: figures are PNG, PDF or SVG; end the name in {_or(FORMATS)}")


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _save(figure, path: Path) -> None:  # type: ignore[no-untyped-def]
    """Write a figure in the format that its file's name ends in, the same bytes every time."""
    import matplotlib

    check_figure(path)
    form = path.suffix.lower()[1:]
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form, {})
    buffer = io.BytesIO()
    # Type 42: letters stay letters in PDF, which journals ask for.
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "mrcnf"}):
        figure.savefig(buffer, format=form, dpi=DPI, metadata=undated)
    _pyplot().close(figure)
    files.write(path, buffer.getvalue())
