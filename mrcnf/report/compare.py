"""Runs beside each other: what differs between them, what they cost, what they reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrcnf.errors import UserError
from mrcnf.runs import checkpoint, config, metrics

# Where a run lies, what it is called, how long it goes and how it is watched: no difference.
_ASIDE = ("name", "data.root", "train.log_every", "train.checkpoint_every", "train.device",
          "train.evaluate_every", "train.sample_every", "train.tensorboard")  # fmt: skip


@dataclass
class Row:
    """One level of one run."""

    run: Path
    resolution: int
    parameters: int
    step: int
    minutes: float
    bpd: float | None
    """The last `test_bpd` of metrics.jsonl; None without train.evaluate_every."""
    bpd_stderr: float | None
    settings: dict[str, Any]
    """What this level's configuration has otherwise than the first run's."""


def compare(runs: Sequence[Path | str]) -> list[Row]:
    """The levels of the runs, coarsest first, each level's runs in the order given.

    Raises:
        UserError: a run holds no trained level, or one without its configuration.
    """
    if not runs:
        raise UserError("no runs to compare; name at least one run folder")
    rows: list[Row] = []
    first: dict[int, dict[str, Any]] = {}
    for run in map(Path, runs):
        for resolution, metadata in checkpoint.describe(run).items():
            folder = checkpoint.level_folder(run, resolution)
            settings = _settings(folder / checkpoint.CONFIG)
            settings["data.sha256"] = metadata["data"][:12]
            base = first.setdefault(resolution, settings)
            last = (metrics.read_curve(folder) or [{}])[-1]
            rows.append(
                Row(
                    run=run,
                    resolution=resolution,
                    parameters=metadata["parameters"],
                    step=metadata["step"],
                    minutes=metadata["seconds"] / 60,
                    bpd=last.get("test_bpd"),
                    bpd_stderr=last.get("test_bpd_stderr"),
                    settings={k: v for k, v in settings.items() if base.get(k) != v},
                )
            )
    return sorted(rows, key=lambda row: row.resolution)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| run | level | parameters | steps | minutes | test bits/dim | differs in |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, name in zip(rows, labels([row.run for row in rows]), strict=True):
        bpd = "" if row.bpd is None else f"{row.bpd:.4f}"
        bpd += "" if row.bpd_stderr is None else f" ± {row.bpd_stderr:.4f}"
        differs = ", ".join(f"{key} = {value}" for key, value in row.settings.items())
        lines.append(
            f"| {name} | {row.resolution} | {row.parameters:,} | {row.step:,} | "
            f"{row.minutes:.1f} | {bpd} | {differs} |"
        )
    return "\n".join(lines)


def labels(runs: Sequence[Path]) -> list[str]:
    """What each run is called beside the others: its folder's name, or its path if names meet."""
    names = [run.resolve().name for run in runs]
    distinct = [name for name, _ in set(zip(names, runs, strict=True))]
    return [
        name if distinct.count(name) == 1 else str(run)
        for run, name in zip(runs, names, strict=True)
    ]


def _settings(path: Path) -> dict[str, Any]:
    """A level's configuration as dotted keys."""
    pairs = dotted(config.to_table(config.load(path)))
    return {key: value for key, value in pairs if key not in _ASIDE}


def dotted(nested: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested tables as pairs of dotted keys and values."""
    pairs: list[tuple[str, Any]] = []
    for key, value in nested.items():
        inside = isinstance(value, dict)
        pairs += dotted(value, f"{prefix}{key}.") if inside else [(f"{prefix}{key}", value)]
    return pairs
