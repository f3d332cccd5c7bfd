"""The commands that look at what is there: info, compare, check."""

from __future__ import annotations

from json import dumps
from pathlib import Path

from mrcnf import files
from mrcnf.cli.common import Paths, Run
from mrcnf.measure import check as checks
from mrcnf.report import compare as comparison
from mrcnf.report import plot
from mrcnf.runs import checkpoint


def info(run: Run) -> None:
    """What a run holds: levels, sizes, training, data.

    Args:
        run: a run folder.
    """
    for resolution, metadata in checkpoint.describe(run).items():
        weights = checkpoint.level_folder(run, resolution) / checkpoint.WEIGHTS
        field = ", ".join(f"{key} {value}" for key, value in metadata["field"].items())
        print(
            f"level {resolution}: {metadata['parameters']:,} parameters ({field}); "
            f"{metadata['objective']}, step {metadata['step']} of {metadata['steps']}"
            f"{' (unfinished)' if metadata['step'] < metadata['steps'] else ''}, "
            f"{metadata['seconds'] / 60:.1f} min; {metadata['data_name']} "
            f"(sha256 {metadata['data'][:12]}…); {weights.stat().st_size / 1e6:.1f} MB"
        )


def compare(runs: Paths, out: Path | None = None) -> None:
    """A table of runs: how they differ, what they cost, and their bits/dim on test images.

    Args:
        runs: run folders, trained with train.evaluate_every for the bits/dim.
        out: PNG file for the curves of bits/dim against training time.
    """
    rows = comparison.compare(runs)
    if out is not None:
        plot.bpd_curves(out, runs)
    print(comparison.table(rows))


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
