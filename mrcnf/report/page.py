"""Runs as a page to open in a browser: a report on one, or several side by side."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from mrcnf import files
from mrcnf.errors import UserError
from mrcnf.report import compare, numbers, origin, pictures
from mrcnf.report.document import Block, Page, Section, render
from mrcnf.report.subject import Limits, Subject
from mrcnf.runs import checkpoint

SUFFIXES = (".html", ".htm")


def check_page(path: Path) -> None:
    """A UserError unless a name ends as those of pages do."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: a page is HTML; end the name in .html")


def report(
    subject: Subject, out: Path, *, command: str = "", facts: Sequence[tuple[str, str]] = ()
) -> None:
    """Write a page about one run.

    Args:
        subject: the run, with how much work is to be done.
        out: the HTML file.
        command: what makes the page again; `mrcnf report` by default.
        facts: names and values to stand in its header beside the usual ones.

    Raises:
        UserError: the page cannot be written. What a run lacks for a section the section says.
    """
    check_page(out)
    sections = _sections([subject], command or _command("report", [subject], out))
    number = numbers.digits(subject.evaluation) if numbers.has_bits(subject) else ""
    page = Page(
        title=subject.name,
        kicker="mrcnf report",
        number=number,
        unit="bits/dim" if number else "",
        about=_about(subject) if number else "",
        facts=[*_facts(subject), *facts],
        notes=[f"Not finished: {note}." for note in checkpoint.unfinished(subject.run)],
        sections=sections,
    )
    files.write(out, render(page))


def beside(
    runs: Sequence[Path],
    out: Path,
    *,
    limits: Limits | None = None,
    overrides: Sequence[str] = (),
    progress: bool = False,
) -> None:
    """Write a page of several runs side by side, a colour for each.

    Args:
        runs: run folders, each with at least one trained level.
        out: the HTML file.
        limits, overrides, progress: as `Subject` takes them, for every run.

    Raises:
        UserError: no runs, one of them twice, no such run or settings, or the page cannot be
            written.
    """
    check_page(out)
    if not runs:
        raise UserError("no runs to compare; name at least one run folder")
    if len(set(runs)) < len(runs):
        raise UserError("a run is named twice; name each run folder once")
    subjects = [
        Subject(run, number, name, limits, overrides, progress=progress)
        for number, (run, name) in enumerate(zip(runs, compare.labels(runs), strict=True))
    ]
    sections = _sections(subjects, _command("compare", subjects, out))
    measured = [subject for subject in subjects if numbers.has_bits(subject)]
    page = Page(
        title=" · ".join(subject.name for subject in subjects),
        kicker="mrcnf compare",
        facts=[(s.name, f"{numbers.digits(s.evaluation)} bits/dim") for s in measured],
        notes=[
            f"{subject.name}: {note}."
            for subject in subjects
            for note in checkpoint.unfinished(subject.run)
        ],
        sections=sections,
    )
    files.write(out, render(page))


def _sections(subjects: list[Subject], command: str) -> list[Section]:
    builders: dict[str, Callable[[list[Subject]], list[Block]]] = {
        "Bits per dimension": numbers.bits,
        "Training": numbers.training,
        "Samples": pictures.samples,
        "Upscalings": pictures.upscalings,
        "Nearest training images": pictures.neighbours,
        "Likelihoods": numbers.likelihoods,
        "Configuration": origin.configuration,
        "Provenance": lambda subjects: origin.provenance(subjects, command),
    }
    sections = []
    quiet = not subjects[0].progress
    with tqdm(builders.items(), desc="page", unit="section", disable=quiet) as bar:
        for title, build in bar:
            bar.set_postfix_str(title)
            sections.append(Section(title, build(subjects)))
    return sections


def _command(name: str, subjects: Sequence[Subject], out: Path) -> str:
    """The command line that makes a page, with the limits that are not the defaults."""
    limits, usual = subjects[0].limits, Limits()
    options = {
        "--images": (limits.images, usual.images),
        "--training-images": (limits.training_images, usual.training_images),
        "--device": (limits.device, usual.device),
    }
    given = [str(w) for key, (v, default) in options.items() if v != default for w in (key, v)]
    given += ["--trust"] if limits.trust else []
    runs = [str(subject.run) for subject in subjects]
    return shlex.join(["mrcnf", name, *runs, "--out", str(out), *given, *subjects[0].overrides])


def _about(subject: Subject) -> str:
    result = subject.evaluation
    side, channels = subject.model.config.finest, subject.model.config.channels
    colour = "in colour" if channels == 3 else "in grey"
    return f"on {result.images:,} images of {result.data}, {side}×{side} {colour}; lower is better"


def _facts(subject: Subject) -> list[tuple[str, str]]:
    levels = subject.levels
    seconds = sum(level["seconds"] for level in levels.values())
    parameters = sum(level["parameters"] for level in levels.values())
    objectives = dict.fromkeys(level["objective"] for level in levels.values())
    return [
        ("levels", ", ".join(map(str, levels))),
        ("parameters", f"{parameters:,}"),
        ("trained by", ", ".join(objectives)),
        ("training time", f"{seconds / 60:.1f} min"),
    ]
