"""Copying the levels of several runs together, as they are or halved for use."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mrcnf.errors import UserError
from mrcnf.model.level import Level
from mrcnf.runs import metrics
from mrcnf.runs.calibration import HEADS, detach
from mrcnf.runs.checkpoint import CONFIG, WEIGHTS, find_levels, level_folder, load
from mrcnf.runs.tensors import read_metadata, write_tensors


def assemble(
    runs: Iterable[Path | str],
    out: Path,
    *,
    keep: bool = False,
    half: bool = False,
    trust: bool = False,
) -> list[int]:
    """Copy the levels of several runs into one run folder; returns their resolutions.

    Args:
        runs: folders that hold a level or more each.
        out: the new run folder.
        keep: leave levels that are there already as they are, instead of refusing.
        half: copies for use only: parameters in float16, without the state for resuming.
        trust: run the code that the runs name, if they do.

    Raises:
        UserError: the levels do not make a model, one is there already, or a copy fails; then
            none that was begun is left.
    """
    runs = list(runs)
    model = load(runs, trust=trust)  # proves that they fit, before anything is copied
    folders = [pair for run in runs for pair in find_levels(run).items()]
    copies = {folder: level_folder(out, resolution) for resolution, folder in folders}
    if keep:
        copies = {folder: target for folder, target in copies.items() if not target.exists()}
    for target in copies.values():
        if target.exists():
            raise UserError(f"{target} is there already; choose another --out")
    halves = {
        folder: _halved(folder / WEIGHTS, model.level(resolution))
        for resolution, folder in folders
        if half and folder in copies
    }
    for folder, target in copies.items():
        _copy(folder, target, halves.get(folder))
    return list(model.resolutions)


def _copy(folder: Path, target: Path, halved: dict[str, Tensor] | None) -> None:
    """A level's folder, whole or not at all; with other weights and for use if there are any."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a copy that was killed
    try:
        shutil.copytree(folder, part, ignore=None if halved is None else _all_but_notes)
        if halved is not None:
            write_tensors(part / WEIGHTS, halved, read_metadata(folder / WEIGHTS))
        part.rename(target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"cannot copy {folder} to {target}: {error}") from None


def _halved(path: Path, level: Level) -> dict[str, Tensor]:
    """The level's state_dict with its parameters in float16; buffers stay as they are.

    Raises:
        UserError: a parameter is too large for float16; the message names it and the path.
    """
    detach(level)
    tensors = level.state_dict()
    for name, parameter in level.named_parameters():
        tensors[name] = parameter.half()
        if bool((tensors[name].isinf() & parameter.isfinite()).any()):
            raise UserError(
                f"{path} cannot be halved: {name} reaches {float(parameter.abs().max()):.3g}, and "
                f"float16 ends at {torch.finfo(torch.float16).max:g}; copy it without --half"
            )
    return tensors


def _all_but_notes(_: str, names: list[str]) -> set[str]:
    """What of a level's folder a copy for use leaves out, or writes anew."""
    code = {name for name in names if name.endswith(".py")}
    return set(names) - {CONFIG, metrics.FILE, HEADS} - code
