"""A page's sections of numbers: bits per dimension, likelihoods image by image, training."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mrcnf.errors import UserError
from mrcnf.flows.solve import SolverError
from mrcnf.measure.classical import available, classical_sizes
from mrcnf.measure.evaluate import ALIKE, Evaluation, LevelReport, mean_and_error
from mrcnf.report import inline, plot
from mrcnf.report.document import Block, Chart, Code, Picture, Swatch, Table, Text
from mrcnf.report.subject import CONVERGENCE, Subject
from mrcnf.runs import checkpoint, metrics

SECTIONS = ("data", "evaluate", "solver", "trace")
"""Whose settings a page may be told."""
EXTREMES = 10
"""Most and least likely images that are shown of each level."""

T = TypeVar("T")


def of_each(
    subjects: Sequence[Subject], make: Callable[[Subject], T], missing: list[Block]
) -> Iterator[tuple[Subject, T]]:
    """What there is of the runs; for what there is not, a sentence is added to `missing`."""
    for subject in subjects:
        try:
            yield subject, make(subject)
        except (UserError, SolverError) as error:
            whose = f"{subject.name}: " if len(subjects) > 1 else ""
            words = Text(f"{whose}Not shown, because {error}.", aside=True)
            if words not in missing:
                missing.append(words)


def swatch(subject: Subject) -> Swatch:
    """How figures draw a run, in a legend."""
    style = plot.line_style(subject.number)
    marker = dict(zip(plot.MARKERS, "●■◆▲▼✚", strict=True))[style["marker"]]
    return Swatch(subject.name, style["color"], style["linestyle"], marker)


def legend(subjects: Sequence[Subject]) -> list[Swatch]:
    return [swatch(subject) for subject in subjects] if len(subjects) > 1 else []


def digits(part: Evaluation | LevelReport) -> str:
    return f"{part.bpd:.3f} ± {part.bpd_stderr:.3f}"


def resolutions(subjects: Sequence[Subject]) -> list[int]:
    return sorted({resolution for subject in subjects for resolution in subject.levels})


def command(subject: Subject, name: str, *options: object, takes: Sequence[str] = ()) -> str:
    """A command line about a run, with those of the page's overrides whose section it takes."""
    overrides = [given for given in subject.overrides if given.split(".")[0] in takes]
    trust = ["--trust"] if subject.limits.trust else []
    return shlex.join(["mrcnf", name, str(subject.run), *map(str, options), *trust, *overrides])


def bits(subjects: Sequence[Subject]) -> list[Block]:
    """Bits per dimension, their convergence, and classical codecs on the same images."""
    missing: list[Block] = []
    found = list(of_each(subjects, lambda subject: subject.evaluation, missing))
    blocks: list[Block] = []
    if len(subjects) == 1:
        blocks += [_by_level(result) for _, result in found]
    elif found:
        blocks.append(_side_by_side(found))
    blocks += [Text(words) for words in _hows(found, len(subjects) == 1)]
    if found:
        blocks.append(Code("\n".join(_evaluate_command(s, result) for s, result in found)))
        blocks += _codecs(subjects, missing)
    return [*blocks, *missing]


def _by_level(result: Evaluation) -> Table:
    rows = [
        (f"level {part.resolution}", digits(part), f"{part.nfe:.0f}") for part in result.levels
    ]
    return Table(
        ("", "bits/dim", "NFE"),
        [*rows, ("together", digits(result), "")],
        caption="Each level's share, in bits per dimension of the finest image, and how often its "
        "network is evaluated for it",
        strong=[len(rows)],
    )


def _side_by_side(found: Sequence[tuple[Subject, Evaluation]]) -> Table:
    """Runs in rows; differences are image by image where the images are the same."""
    first, base = found[0]
    levels = resolutions([subject for subject, _ in found])
    rows = []
    for subject, result in found:
        shares = {part.resolution: digits(part) for part in result.levels}
        difference = ""
        if subject is not first and _alike(subject, result, first, base):
            change = result.bits.sum(0) - base.bits.sum(0)
            groups = subject.test.groups
            mean, error = mean_and_error(change, None if groups is None else groups[: len(change)])
            difference = f"{mean:+.3f} ± {error:.3f}"
        total = (subject.name, digits(result), difference)
        own = (shares.get(level, "") for level in levels)
        rows.append([*total, *own, _finer(result).removesuffix(" bits/dim")])
    head = ["", "bits/dim", f"minus {first.name}", *(f"level {level}" for level in levels)]
    return Table(
        [*head, "solved finer"],
        rows,
        caption="Bits per dimension, and each level's share of them; differences image by image, "
        "with the same noise, where the test images are the same; and what solving the first "
        f"{CONVERGENCE} images or fewer more finely adds",
        swatches=[swatch(subject) for subject, _ in found],
    )


def _alike(one: Subject, result: Evaluation, other: Subject, base: Evaluation) -> bool:
    """Whether two runs were measured on the same images with the same noise."""
    how, otherwise = one.settings.evaluate, other.settings.evaluate
    noise = (how.seed, how.batch, how.draws) == (otherwise.seed, otherwise.batch, otherwise.draws)
    return noise and result.images == base.images and one.test_data == other.test_data


def _hows(found: Sequence[tuple[Subject, Evaluation]], alone: bool) -> list[str]:
    """How bits were measured, and of which runs where it is not the same of all."""
    if alone:
        return [f"{_how(result)} {_convergence(result)}" for _, result in found]
    said: dict[str, list[str]] = {}
    for subject, result in found:
        said.setdefault(_how(result), []).append(subject.name)
    if len(said) == 1:
        return list(said)
    return [f"{', '.join(names)}: {words}" for words, names in said.items()]


def _how(result: Evaluation) -> str:
    solver = result.solver if result.solver.startswith("no ") else f"solver {result.solver}"
    small = ", which are alike: they are too small" if result.error_over == ALIKE else ""
    return (
        f"{result.images:,} images of {result.data}, {result.noise_draws} each; {solver}; trace "
        f"{result.trace}. Errors are standard errors over {result.error_over}{small}. The bits are "
        "an upper bound on −log₂ P per dimension."
    )


def _convergence(result: Evaluation) -> str:
    if not result.convergence:
        return "No level has a solver: the digits do not depend on one."
    step = result.convergence[-1]
    return f"With {step['solver']} the first {step['images']} images change by {_finer(result)}."


def _finer(result: Evaluation) -> str:
    """What solving more finely changes, or nothing where there is nothing to solve."""
    if not result.convergence:
        return ""
    step = result.convergence[-1]
    return f"{step['difference']:+.4f} ± {step['difference_stderr']:.4f} bits/dim"


def _evaluate_command(subject: Subject, result: Evaluation) -> str:
    convergence = ["--convergence"] if result.convergence else []
    limit = 0 if result.images == len(subject.test) else result.images
    return command(subject, "evaluate", "--limit", limit, *convergence, takes=SECTIONS)


def _codecs(subjects: Sequence[Subject], missing: list[Block]) -> list[Block]:
    """Classical codecs on each set of test images that a run was measured on."""
    formats, left_out = available()
    blocks: list[Block] = []
    seen = set()
    for subject, images in of_each(subjects, lambda subject: subject.measured, missing):
        key = (subject.test_data, len(images))
        if key in seen:
            continue
        seen.add(key)
        sizes = {(size.name, size.mosaic): size for size in classical_sizes(images, formats)}
        rows = [
            (name, *(f"{sizes[name, mosaic].bits_per_dim:.3f}" for mosaic in (False, True)))
            for name in formats
        ]
        own = ("this model's bound", f"{subject.evaluation.bpd:.3f}", "")
        blocks.append(
            Table(
                ("", "a file each", "one mosaic of all"),
                [own, *rows] if len(subjects) == 1 else rows,
                caption=f"Classical lossless codecs on the same {len(images):,} images of "
                f"{subject.test.name}, in bits per dimension, headers included",
                strong=[0] if len(subjects) == 1 else [],
            )
        )
    if left_out and blocks:
        blocks.append(Text(f"{left_out}."))
    return blocks


def training(subjects: Sequence[Subject]) -> list[Block]:
    """What training cost, its loss and the bits on test images against wall-clock time."""
    head = ["", "level", "parameters", "objective", "steps", "minutes", "images/s", "test bits/dim"]
    rows, marks = [], []
    for resolution in resolutions(subjects):
        for subject in subjects:
            if resolution in subject.levels:
                rows.append(_training_row(subject, resolution))
                marks.append(swatch(subject))
    if len(subjects) == 1:
        head[0:2], rows, marks = ["level"], [row[1:] for row in rows], []
    blocks: list[Block] = [
        Table(
            head,
            rows,
            swatches=marks,
            caption="What training took; test bits/dim are the last of the curve",
        )
    ]
    lines = {
        (subject.number, resolution): metrics.read(folder)
        for subject in subjects
        for resolution, folder in checkpoint.find_levels(subject.run).items()
    }
    losses = _panels(subjects, lines, "loss", plot.draw_loss)
    curves = _panels(subjects, lines, "test_bpd", _draw_band)
    pairs = [(losses.get(level), curves.get(level)) for level in resolutions(subjects)]
    if panels := [panel for pair in pairs for panel in pair if panel]:
        caption = "Against wall-clock time: the loss, as a running mean"
        if curves:
            caption += (
                "; and each level's share of the bits/dim on test images, by the averaged weights, "
                "with a band of one standard error over images"
            )
        blocks.append(Chart(panels, f"{caption}.", legend(subjects)))
    if not losses:
        blocks.append(Text("There is no loss to show: no level has a metrics.jsonl.", aside=True))
    if not curves:
        fewest = min(level["steps"] for subject in subjects for level in subject.levels.values())
        every = f"train.evaluate_every={max(1, min(500, fewest // 5))}"
        why = f"There is no curve of test bits: train with {every} to have one."
        blocks.append(Text(why, aside=True))
    return blocks


def _training_row(subject: Subject, resolution: int) -> list[str]:
    level = subject.levels[resolution]
    rows = metrics.read(checkpoint.level_folder(subject.run, resolution))
    paces = torch.tensor([row["images_per_s"] for row in rows if "images_per_s" in row])
    curve = metrics.read_curve(checkpoint.level_folder(subject.run, resolution))
    last = curve[-1] if curve else {}
    error = f" ± {last['test_bpd_stderr']:.3f}" if "test_bpd_stderr" in last else ""
    step, steps = level["step"], level["steps"]
    return [
        subject.name,
        f"{resolution}",
        f"{level['parameters']:,}",
        level["objective"],
        f"{step:,}" if step == steps else f"{step:,} of {steps:,}",
        f"{level['seconds'] / 60:.1f}",
        f"{paces.median():.0f}" if len(paces) else "",
        f"{last['test_bpd']:.3f}{error}" if last else "",
    ]


def _panels(
    subjects: Sequence[Subject],
    lines: dict[tuple[int, int], list[dict[str, float]]],
    key: str,
    draw: Callable[..., object],
) -> dict[int, str]:
    """A panel for each level that has values of the key, a line for each run."""
    panels = {}
    what, up = {"loss": ("loss", "loss"), "test_bpd": ("test images", "bits/dim")}[key]
    for resolution in resolutions(subjects):
        shown = [
            (subject, rows)
            for subject in subjects
            if (rows := [row for row in lines.get((subject.number, resolution), []) if key in row])
        ]
        if not shown:
            continue

        def paint(axis, shown=shown) -> None:  # type: ignore[no-untyped-def]
            for subject, rows in shown:
                draw(axis, rows, **plot.line_style(subject.number))

        ends = "; ".join(
            f"{subject.name} ends at {rows[-1][key]:.3f} after {rows[-1]['seconds'] / 60:.1f} min"
            for subject, rows in shown
        )
        title = f"level {resolution}, {what}"
        alt = f"{title}: {up} against training time; {ends}"
        panels[resolution] = inline.panel(
            paint, alt, title=title, across=plot.TRAINING_TIME, up=up
        )
    return panels


def _draw_band(axis, rows: Sequence[dict[str, float]], **style: str) -> None:  # type: ignore[no-untyped-def]
    minutes = [row["seconds"] / 60 for row in rows]
    bits = torch.tensor([row["test_bpd"] for row in rows])
    errors = torch.tensor([row.get("test_bpd_stderr", 0.0) for row in rows])
    plot.draw_bits(axis, rows, **style)
    band = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
    axis.fill_between(minutes, (bits - errors).numpy(), (bits + errors).numpy(), **band)


def likelihoods(subjects: Sequence[Subject]) -> list[Block]:
    """Bits per dimension image by image, level by level; the most and the least likely images."""
    missing: list[Block] = []
    found = list(of_each(subjects, lambda subject: subject.evaluation.bits, missing))
    blocks: list[Block] = []
    if found:
        panels = [_histogram("all levels", [(s, values.sum(0)) for s, values in found])]
        for resolution in resolutions(subjects):
            shares = [
                (subject, values[subject.model.resolutions.index(resolution)])
                for subject, values in found
                if resolution in subject.model.resolutions
            ]
            if shares:
                panels.append(_histogram(f"level {resolution}", shares))
        counts = ", ".join(sorted({f"{values.shape[1]:,}" for _, values in found}))
        caption = (
            f"How the bits/dim of {counts} test images are distributed, together and level by "
            "level; the dotted line is the mean."
        )
        blocks.append(Chart(panels, caption, legend(subjects)))
    for subject, values in found:
        blocks += _extremes(subject, values, len(subjects) > 1)
    return [*blocks, *missing]


def _histogram(title: str, values: Sequence[tuple[Subject, Tensor]]) -> str:
    lowest = min(float(v.min()) for _, v in values)
    highest = max(float(v.max()) for _, v in values)
    edges = torch.linspace(lowest, max(highest, lowest + 1e-6), 31, dtype=torch.float64)

    def paint(axis) -> None:  # type: ignore[no-untyped-def]
        for subject, found in values:
            style = plot.line_style(subject.number)
            colour, counts = style["color"], torch.histogram(found, edges).hist.numpy()
            axis.stairs(counts, edges.numpy(), fill=True, alpha=0.25, color=colour)
            axis.stairs(counts, edges.numpy(), color=colour, linestyle=style["linestyle"])
            axis.axvline(float(found.mean()), color=colour, linestyle=":", linewidth=1)

    said = "; ".join(
        f"{subject.name} from {float(found.min()):.2f} to {float(found.max()):.2f}, mean "
        f"{float(found.mean()):.2f}"
        for subject, found in values
    )
    alt = f"Histogram of bits/dim image by image, {title}: {said}"
    return inline.panel(paint, alt, title=title, across="bits/dim", up="images")


def _extremes(subject: Subject, values: Tensor, named: bool) -> list[Block]:
    """The most and the least likely test images, of all levels and of each."""
    images = subject.measured
    blocks: list[Block] = []
    shown = max(1, min(EXTREMES, subject.columns, len(images) // 2))
    whose = f"{subject.name}, " if named else "By "
    parts = {"all levels": values.sum(0)}
    if not named and len(values) > 1:
        parts |= {f"level {r}": v for r, v in zip(subject.model.resolutions, values, strict=True)}
    for title, own in parts.items():
        order = own.argsort(stable=True)
        ends = torch.cat((order[:shown], order[-shown:].flip(0)))
        most, least = own[order[:shown]], own[order[-shown:]]
        caption = (
            f"{whose}{title}. Above: the {shown} most likely of {len(own):,} test images, "
            f"{most[0]:.2f} to {most[-1]:.2f} bits/dim. Below: the {shown} least likely, "
            f"{least[-1]:.2f} to {least[0]:.2f}."
        )
        alt = f"Two rows of {shown} test images: the most likely by {title}, and the least likely"
        blocks.append(Picture(images[ends], shown, alt, caption))
    return blocks


def has_bits(subject: Subject) -> bool:
    """Whether a run could be measured."""
    return any(of_each([subject], lambda subject: subject.evaluation, []))
