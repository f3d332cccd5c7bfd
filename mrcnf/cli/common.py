"""What several commands take, and what they say beside their results."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from mrcnf.runs import checkpoint

Overrides = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE")]
"""Settings to change, section.key=value; see `app.gather_overrides`."""
Run = tyro.conf.Positional[Path]
"""A run folder."""
Paths = tyro.conf.Positional[tuple[Path, ...]]
"""Files or folders, any number of them."""


def speaks() -> bool:
    """Under torchrun one process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def note_unfinished(run: Path) -> None:
    """Say on stderr which levels of a run are not trained to their end."""
    for note in checkpoint.unfinished(run):
        print(f"mrcnf: note: {note}", file=sys.stderr)
