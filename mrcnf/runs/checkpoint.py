"""Runs on disk: a folder per level, files that explain and check themselves.

    RUN/level-16/weights.safetensors   the level for use (averaged weights); its configuration
                                       travels in the file's metadata
                 state.safetensors     everything that training needs to go on
                 config.toml           the resolved configuration, with the data's hash
                 metrics.jsonl         one line per log interval
                 codec.safetensors     what `mrcnf calibrate` found out for the codec
                 MODULE.py             a user's own field, flow, data source or objective
                 samples-STEP.png      what training drew as it went

Levels are independent: any process may write its own level's folder, and folders copied
together make a model. Files are written under a temporary name, then renamed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrcnf import plugins
from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import ModelConfig
from mrcnf.runs import calibration
from mrcnf.runs.agreement import Origin, check_weights, common_model, rebuilt
from mrcnf.runs.tensors import read_metadata, read_tensors, write_tensors

WEIGHTS, STATE, PREVIOUS = "weights.safetensors", "state.safetensors", "state.previous.safetensors"
CONFIG = "config.toml"
_NOISE = ("learned_noise.", "dequantiser.")
"""How the names of learned noise's tensors begin: now, and in files of earlier versions."""


def level_folder(run: Path, resolution: int) -> Path:
    """Where a level of a run is, or is to be."""
    return Path(run) / f"level-{resolution}"


def save_level(
    folder: Path, level: Level, weights: dict[str, Tensor], extra: dict[str, Any]
) -> None:
    """Write a level for use: `weights` are its state_dict; `extra` joins the metadata.

    In `extra`, "code" has the hashes of what is of the user's own (`plugins.hashes`).
    """
    metadata = {
        "resolution": level.resolution,
        "model": dataclasses.asdict(level.model),
        "flow": dataclasses.asdict(level.flow_config),
        "field": dataclasses.asdict(level.field),
        "solver": dataclasses.asdict(level.solver),
        "trace": dataclasses.asdict(level.trace),
        **extra,
    }
    write_tensors(folder / WEIGHTS, weights, metadata)


def describe(run: Path | str) -> dict[int, dict[str, Any]]:
    """The metadata of each level of a run, without its tensors, by resolution."""
    return {
        resolution: read_metadata(folder / WEIGHTS)
        for resolution, folder in find_levels(run).items()
    }


def find_levels(run: Path | str) -> dict[int, Path]:
    """The folders of a run that hold weights, by resolution, coarsest first.

    Raises:
        UserError: there is no such folder, or nothing trained in it.
    """
    run = Path(run)
    if not run.is_dir():
        raise UserError(
            f"there is no run folder {run}; train one with `mrcnf train` or `mrcnf demo`"
        )
    found = {}
    for folder in run.iterdir():
        match = re.fullmatch(r"level-([1-9][0-9]*)", folder.name)
        if match and (folder / WEIGHTS).is_file():
            found[int(match[1])] = folder
    if not found:
        raise UserError(f"{run} holds no trained level (no level-*/{WEIGHTS}); is it a run folder?")
    return dict(sorted(found.items()))


def load(
    run: Path | str | Iterable[Path | str],
    device: torch.device | str = "cpu",
    *,
    trust: bool = False,
) -> MultiResolutionFlow:
    """Open a trained model, in eval mode.

    Args:
        run: a run folder, or several that hold a level each.
        device: where the model is to live.
        trust: run the code of fields and flows that the run names as `module:object`, if it does.

    Raises:
        UserError: nothing trained there, levels missing or of different models, damaged files, or
            code that is not trusted or does not fit.
    """
    runs = [run] if isinstance(run, (str, Path)) else list(run)
    files: dict[int, Path] = {}
    for folder in runs:
        for resolution, path in find_levels(folder).items():
            if resolution in files:
                raise UserError(f"level {resolution} is in both {files[resolution]} and {path}")
            files[resolution] = path
    loaded = [_read_level(path / WEIGHTS) for _, path in sorted(files.items())]
    model = common_model([origin for origin, _, _ in loaded])
    levels = [_build(model, *parts, trust) for parts in loaded]
    for level in levels:
        calibration.attach(files[level.resolution], level)
    # For use: whoever wants gradients by the weights turns them on with requires_grad_().
    return MultiResolutionFlow(levels).to(device).eval().requires_grad_(False)


def load_level(
    run: Path | str, resolution: int, device: torch.device | str = "cpu", *, trust: bool = False
) -> Level:
    """Open one trained level of a run that may lack the others, in eval mode.

    Args:
        trust: as for `load`.

    Raises:
        UserError: the run has no such level, its file is damaged, or as `load`.
    """
    path = _weights_of(run, resolution)
    origin, tensors, metadata = _read_level(path)
    # Bits are per dimension of the finest image that any level of the run was made for. Coarser
    # levels of others' plans are none of its own.
    planned = {r for other in describe(run).values() for r in other["model"]["resolutions"]}
    own = origin.model.resolutions
    finer = sorted(r for r in planned if r > own[-1])
    model = dataclasses.replace(origin.model, resolutions=(*own, *finer))
    level = _build(model, origin, tensors, metadata, trust)
    calibration.attach(path.parent, level)
    return level.to(device).eval().requires_grad_(False)


def load_weights(run: Path | str, level: Level, resolution: int = 0) -> None:
    """Give a level the weights and the standardisation of one in a trained run.

    Args:
        resolution: of the level to take them from; 0: of the level's own.

    Raises:
        UserError: the run has no such level, or one of another field or model.
    """
    origin, tensors, _ = _read_level(_weights_of(run, resolution or level.resolution))
    check_weights(origin, any(name.startswith(_NOISE) for name in tensors), level)
    _fill(level, tensors, origin.path)


def unfinished(run: Path | str) -> list[str]:
    """What a run still lacks of its own configuration, a line each."""
    levels, notes = describe(run), []
    for resolution, metadata in levels.items():
        step, steps = metadata.get("step", 0), metadata.get("steps", 0)
        if step < steps:
            notes.append(f"level {resolution} is at step {step} of {steps}")
    planned = {r for metadata in levels.values() for r in metadata["model"]["resolutions"]}
    notes += [f"level {r} is not trained yet" for r in sorted(planned - levels.keys())]
    return notes


def _weights_of(run: Path | str, resolution: int) -> Path:
    folders = find_levels(run)
    if resolution not in folders:
        raise UserError(f"{run} has no level {resolution}: its levels are {list(folders)}")
    return folders[resolution] / WEIGHTS


def _read_level(path: Path) -> tuple[Origin, dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_tensors(path)
    if missing := {"resolution", "model", "field", "solver", "trace"} - metadata.keys():
        raise UserError(f"{path} does not hold a level: it lacks {', '.join(sorted(missing))}")
    if path.parent.name != f"level-{metadata['resolution']}":
        raise UserError(f"{path} holds a level {metadata['resolution']}; rename its folder back")
    return Origin.of(path, metadata), tensors, metadata


def _build(
    model: ModelConfig,
    origin: Origin,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    trust: bool,
) -> Level:
    folder, names = origin.path.parent, (origin.flow.kind, origin.field.kind)
    plugins.require_trust(names, folder, trust)
    with plugins.beside(folder):
        level = Level(
            model,
            origin.resolution,
            origin.field,
            rebuilt(Solver, metadata["solver"], origin.path),
            rebuilt(Trace, metadata["trace"], origin.path),
            origin.flow,
        )
        plugins.warn_if_changed(metadata.get("code", {}), names, origin.path)
    _fill(level, tensors, origin.path)
    return level


def _fill(level: Level, tensors: dict[str, Tensor], path: Path) -> None:
    if level.model.dequantisation == "variational" and level.learned_noise is None:
        # Learned for cells of pixels that are means of finer ones by now.
        tensors = {name: t for name, t in tensors.items() if not name.startswith(_NOISE)}
    try:
        level.load_state_dict({k: v.float() for k, v in tensors.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} does not fit its own configuration: {reason}") from None
