"""The commands that look at what is there: info, report, compare, entropy, check."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path

from mrcnf import files
from mrcnf.cli.common import Overrides, Paths, Run
from mrcnf.codec import container
from mrcnf.errors import UserError
from mrcnf.measure import check as checks
from mrcnf.measure.entropy import entropies, splitting
from mrcnf.measure.evaluate import set_solvers
from mrcnf.model.settings import FlowConfig
from mrcnf.plugins import is_own
from mrcnf.report import compare as comparison
from mrcnf.report import page, plot
from mrcnf.report.subject import Limits, Subject
from mrcnf.runs import checkpoint
from mrcnf.runs.agreement import rebuilt
from mrcnf.runs.config import override
from mrcnf.runs.extend import finest_config
from mrcnf.runs.images import open_images


def info(run: Run) -> None:
    """What a run holds: levels, sizes, training, data; or a compressed file: images, bits.

    Args:
        run: a run folder, or a file that `mrcnf compress` wrote.
    """
    if run.is_file():
        print(container.describe(run))
        return
    for resolution, metadata in checkpoint.describe(run).items():
        weights = checkpoint.level_folder(run, resolution) / checkpoint.WEIGHTS
        settings = {key: value for key, value in metadata["field"].items() if value != {}}
        if is_own(settings["kind"]):  # the others are not told to it
            settings = {k: v for k, v in settings.items() if k in ("kind", "blocks", "options")}
        field = ", ".join(f"{key} {value}" for key, value in settings.items())
        flow = rebuilt(FlowConfig, metadata.get("flow", {}), weights)
        print(
            f"level {resolution}: {metadata['parameters']:,} parameters ({flow}; field: {field}); "
            f"{metadata['objective']}, step {metadata['step']} of {metadata['steps']}"
            f"{' (unfinished)' if metadata['step'] < metadata['steps'] else ''}, "
            f"{metadata['seconds'] / 60:.1f} min; {metadata['data_name']} "
            f"(sha256 {metadata['data'][:12]}…); {weights.stat().st_size / 1e6:.1f} MB"
        )


def report(
    run: Run,
    out: Path | None = None,
    images: int = 256,
    training_images: int = 50_000,
    device: str = "auto",
    trust: bool = False,
    overrides: Overrides = (),
) -> None:
    """One HTML page about a run: bits/dim, curves, samples, upscalings, neighbours, origin.

    Args:
        run: a run folder; sections for which it lacks something say so.
        out: HTML file; RUN/report.html by default.
        images: measure the first so many test images, 0 for all.
        training_images: look for samples' neighbours among the first so many training images, 0
            for all.
        device: auto, cpu, cuda, cuda:N.
        trust: run the code that the run names of its own, if it does: read it first.
        overrides: settings of data, evaluate, solver and trace, e.g. data.root=DIR.
    """
    target = run / "report.html" if out is None else out
    limits = Limits(images, training_images, device, trust)
    page.check_page(target)
    subject = Subject(run, limits=limits, overrides=overrides, progress=sys.stderr.isatty())
    page.report(subject, target)
    print(target)


def compare(
    runs: Paths,
    out: Path | None = None,
    images: int = 256,
    training_images: int = 50_000,
    device: str = "auto",
    trust: bool = False,
    overrides: Overrides = (),
) -> None:
    """A table of runs: how they differ, what they cost, and their bits/dim on test images.

    Args:
        runs: run folders, trained with train.evaluate_every for the bits/dim.
        out: HTML file for the runs side by side, as in `mrcnf report`; or PNG, PDF or SVG file for
            the curves of bits/dim against training time alone.
        images: for the page, measure the first so many test images, 0 for all.
        training_images: for the page, look for neighbours among the first so many training images.
        device: for the page: auto, cpu, cuda, cuda:N.
        trust: for the page: run the code that runs name of their own, if they do: read it first.
        overrides: for the page: settings of data, evaluate, solver and trace.
    """
    if out is not None and out.suffix.lower() not in (*page.SUFFIXES, *plot.FORMATS):
        raise UserError(f"{out}: end the name in .html for a page, or in .png, .pdf or .svg")
    rows = comparison.compare(runs)
    if out is not None and out.suffix.lower() in page.SUFFIXES:
        page.beside(
            runs, out, limits=Limits(images, training_images, device, trust), overrides=overrides,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
    elif out is not None:
        plot.bpd_curves(out, runs)
    print(comparison.table(rows))


def entropy(
    runs: Paths,
    data: str = "",
    limit: int = 1000,
    batch: int = 100,
    json: Path | None = None,
    out: Path | None = None,
    trust: bool = False,
    overrides: Overrides = (),
) -> None:
    """What leaves split flows, and what stays: the entropy of every channel, on test images.

    Args:
        runs: run folders with a split level.
        data: name of the images; each run's training data by default.
        limit: use the first so many images, 0 for all.
        batch: images at once.
        json: file to write the numbers to.
        out: PNG, PDF or SVG file for the figure, a panel for each split.
        trust: run the code that the run names of its own, if it does: read it first.
        overrides: settings of data, solver and trace, section.key=value.
    """
    if not runs:
        raise UserError("no runs to look at; name at least one run folder")
    if out is not None:
        plot.check_figure(out)
    given = [f"data.name={dumps(data)}"] if data else []
    opened = []
    for run in runs:
        levels = splitting(checkpoint.load(run, trust=trust))
        set_solvers(levels, override({}, overrides))
        settings = finest_config(run, [*given, *overrides])
        images = open_images(settings.data, levels[0].model, "test", run=run, trust=trust)
        opened.append((levels, images))
    found = []
    for run, (levels, images) in zip(runs, opened, strict=True):
        pixels = images.pixels[: limit or None]
        found.append(entropies(levels, pixels, batch=batch, progress=sys.stderr.isatty()))
        print(f"{run}, {len(pixels)} images of {images.name}")
        for split in found[-1]:
            print(f"  {split}")
    if json is not None:
        table = {
            str(run): [split.to_dict() for split in splits]
            for run, splits in zip(runs, found, strict=True)
        }
        files.write(json, dumps(table, indent=2) + "\n")
    if out is not None:
        plot.split_entropies(out, dict(zip(comparison.labels(runs), found, strict=True)))


def check(json: Path | None = None) -> None:
    """Prove the numerics on this machine, in seconds.

    Args:
        json: file to write the findings to.
    """
    findings = []
    for finding in checks.run():
        findings.append(finding)
        verdict = "ok    " if finding.holds else "FAILED"
        print(f"{verdict} {finding.claim}: {finding.measured:.2g} (bound {finding.bound:.0e})")
    if json is not None:
        files.write(json, dumps([finding._asdict() for finding in findings], indent=2))
    if not all(finding.holds for finding in findings):
        raise RuntimeError("a numerical check failed on this machine; please report its line")
