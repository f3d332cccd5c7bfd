"""Runs on disk: a folder per level, files that explain and check themselves.

    RUN/level-16/weights.safetensors   the level for use (averaged weights); its configuration
                                       travels in the file's metadata
                 state.safetensors     everything that training needs to go on
                 config.toml           the resolved configuration, with the data's hash
                 metrics.jsonl         one line per log interval

Levels are independent: any process may write its own level's folder, and folders copied
together make a model. Files are written under a temporary name, then renamed; each carries
a checksum over its tensors. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from mrcnf.errors import UserError
from mrcnf.files import write
from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, ModelConfig
from mrcnf.runs import config as configuration
from mrcnf.runs import metrics

WEIGHTS, STATE, PREVIOUS = "weights.safetensors", "state.safetensors", "state.previous.safetensors"
CONFIG = "config.toml"
FORMAT = "mrcnf-2"
_NOISE = "dequantiser."


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors with JSON metadata and a checksum, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(metadata)
    marks = {"format": FORMAT, "metadata": text, "sha256": _checksum(tensors, text)}
    write(path, save(tensors, marks))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        UserError: missing, truncated, altered, or not one of this package's files.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
    _check_format(path, text)
    if text.get("sha256") != _checksum(tensors, text.get("metadata", "")):
        raise UserError(f"{path} is damaged: its checksum does not match its contents")
    return tensors, json.loads(text["metadata"])


def _check_format(path: Path, text: dict[str, str]) -> None:
    found = text.get("format", "")
    if found != FORMAT and found.startswith("mrcnf-"):
        raise UserError(
            f"{path} is of the format {found!r}, this version reads {FORMAT!r}: train it again"
        )
    if found != FORMAT:
        raise UserError(f"{path} was not written by mrcnf (no {FORMAT!r} mark in its metadata)")


def _checksum(tensors: dict[str, Tensor], metadata: str) -> str:
    digest = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def level_folder(run: Path, resolution: int) -> Path:
    return Path(run) / f"level-{resolution}"


def save_level(
    folder: Path, level: Level, weights: dict[str, Tensor], extra: dict[str, Any]
) -> None:
    """Write a level for use: `weights` are its state_dict; `extra` joins the metadata."""
    metadata = {
        "resolution": level.resolution,
        "model": dataclasses.asdict(level.model),
        "field": dataclasses.asdict(level.field),
        "solver": dataclasses.asdict(level.solver),
        "trace": dataclasses.asdict(level.trace),
        **extra,
    }
    write_tensors(folder / WEIGHTS, weights, metadata)


def describe(run: Path | str) -> dict[int, dict[str, Any]]:
    """The metadata of each level of a run, without its tensors, by resolution."""
    return {
        resolution: _metadata(folder / WEIGHTS) for resolution, folder in find_levels(run).items()
    }


def find_levels(run: Path | str) -> dict[int, Path]:
    """The folders of a run that hold weights, by resolution, coarsest first."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(
            f"there is no run folder {run}; train one with `mrcnf train` or `mrcnf demo`"
        )
    found = {}
    for folder in run.iterdir():
        match = re.fullmatch(r"level-(\d+)", folder.name)
        if match and (folder / WEIGHTS).is_file():
            found[int(match[1])] = folder
    if not found:
        raise UserError(f"{run} holds no trained level (no level-*/{WEIGHTS}); is it a run folder?")
    return dict(sorted(found.items()))


def load(
    run: Path | str | Iterable[Path | str], device: torch.device | str = "cpu"
) -> MultiResolutionFlow:
    """Open a trained model, in eval mode.

    Args:
        run: a run folder, or several that hold a level each.
        device: where the model is to live.

    Raises:
        UserError: nothing trained there, levels missing or of different models, damaged files.
    """
    runs = [run] if isinstance(run, (str, Path)) else list(run)
    files: dict[int, Path] = {}
    for folder in runs:
        for resolution, path in find_levels(folder).items():
            if resolution in files:
                raise UserError(f"level {resolution} is in both {files[resolution]} and {path}")
            files[resolution] = path
    files = dict(sorted(files.items()))
    loaded = {resolution: _read_level(path / WEIGHTS) for resolution, path in files.items()}
    model = _common_model({files[r] / WEIGHTS: metadata for r, (_, metadata) in loaded.items()})
    levels = [_build(files[r] / WEIGHTS, model, *loaded[r]) for r in files]
    # For use: whoever wants gradients by the weights turns them on with requires_grad_().
    return MultiResolutionFlow(levels).to(device).eval().requires_grad_(False)


def load_level(
    run: Path | str, resolution: int, device: torch.device | str = "cpu"
) -> Level:
    """Open one trained level of a run that may lack the others, in eval mode."""
    path = _weights_of(run, resolution)
    tensors, metadata = _read_level(path)
    # Bits are per dimension of the finest image that any level of the run was made for.
    resolutions = {r for other in describe(run).values() for r in other["model"]["resolutions"]}
    model = ModelConfig(**{**metadata["model"], "resolutions": tuple(sorted(resolutions))})
    level = _build(path, model, tensors, metadata)
    return level.to(device).eval().requires_grad_(False)


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


def load_weights(run: Path | str, level: Level) -> None:
    """Give a level the weights and the standardisation of its namesake in a trained run.

    Raises:
        UserError: the run has no such level, or one of another field or model.
    """
    path = _weights_of(run, level.resolution)
    tensors, metadata = _read_level(path)
    ours = {"field": dataclasses.asdict(level.field), **dataclasses.asdict(level.model)}
    theirs = {"field": metadata["field"], **metadata["model"]}
    ours["base level"] = level.is_base
    theirs["base level"] = theirs["resolutions"][0] == metadata["resolution"]
    ours["learned noise"] = level.dequantiser is not None
    theirs["learned noise"] = any(name.startswith(_NOISE) for name in tensors)
    for key in ("field", "channels", "nbits", "pyramid", "dequantisation", "whiten", "base",
                "base level", "learned noise"):  # fmt: skip
        if theirs[key] != ours[key]:
            raise UserError(
                f"{path} cannot supply the starting weights: its {key} is {theirs[key]!r}, "
                f"not {ours[key]!r}"
            )
    _refuse_other_finest(path, metadata, level.model.finest)
    _fill(level, tensors, path)


def _weights_of(run: Path | str, resolution: int) -> Path:
    folders = find_levels(run)
    if resolution not in folders:
        raise UserError(f"{run} has no level {resolution}: its levels are {list(folders)}")
    return folders[resolution] / WEIGHTS


def _read_level(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_tensors(path)
    if missing := {"resolution", "model", "field", "solver", "trace"} - metadata.keys():
        raise UserError(f"{path} does not hold a level: it lacks {', '.join(sorted(missing))}")
    return tensors, metadata


def _build(
    path: Path, model: ModelConfig, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> Level:
    level = Level(
        model,
        metadata["resolution"],
        FieldConfig(**metadata["field"]),
        Solver(**metadata["solver"]),
        Trace(**metadata["trace"]),
    )
    _fill(level, tensors, path)
    return level


def _fill(level: Level, tensors: dict[str, Tensor], path: Path) -> None:
    if level.model.dequantisation == "variational" and level.dequantiser is None:
        # Learned for cells of pixels that are means of finer ones by now.
        tensors = {name: t for name, t in tensors.items() if not name.startswith(_NOISE)}
    try:
        level.load_state_dict({k: v.float() for k, v in tensors.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} does not fit its own configuration: {reason}") from None


def assemble(
    runs: Iterable[Path | str], out: Path, *, keep: bool = False, half: bool = False
) -> list[int]:
    """Copy the levels of several runs into one run folder; returns their resolutions.

    Levels that are there already are an error, or left as they are with `keep`. With `half` the
    copies are for use only: parameters in float16, without the state for resuming.
    """
    runs = list(runs)
    model = load(runs)  # proves that they fit, before anything is copied
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
        part = target.with_name(f".{target.name}.part")
        try:
            shutil.copytree(folder, part, ignore=_all_but_notes if half else None)
            if half:
                write_tensors(part / WEIGHTS, halves[folder], _metadata(folder / WEIGHTS))
            part.rename(target)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise UserError(f"cannot copy {folder} to {target}: {error}") from None
    return list(model.resolutions)


def _halved(path: Path, level: Level) -> dict[str, Tensor]:
    """The level's state_dict with its parameters in float16; buffers stay as they are.

    Raises:
        UserError: a parameter is too large for float16; the message names it and the path.
    """
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
    return set(names) - {CONFIG, metrics.FILE}


def finest_config(run: Path | str, overrides: Sequence[str] = ()) -> configuration.Config:
    """The resolved configuration of a run's finest level, with overrides."""
    finest = max(find_levels(run))
    return configuration.load(level_folder(Path(run), finest) / CONFIG, overrides)


def extended_config(
    run: Path, out: Path, resolution: int, overrides: Sequence[str] = (), resume: bool = False
) -> configuration.Config:
    """The configuration for the next finest level of a run: the finest level's, one level up.

    With `resume`, that of the level as it was begun in `out`, if it was.
    """
    begun = level_folder(out, resolution) / CONFIG
    if begun.exists() and resume:
        return configuration.load(begun, overrides)
    if resolution in find_levels(run):
        raise UserError(f"{run} has a level {resolution} already; add --resume to go on with it")
    model = load(run).config
    if resolution != 2 * model.finest:
        raise UserError(
            f"the finest level of {run} is {model.finest}: extend it to {2 * model.finest}, "
            f"not {resolution}"
        )
    for metadata in describe(run).values():
        _refuse_other_finest(run, metadata, resolution)
    levels = json.dumps([*model.resolutions, resolution])
    # The finest level's starting weights are none for the new level, and other images may have no
    # test split for a curve.
    own = [f"model.resolutions={levels}", "train.init=", "train.evaluate_every=0"]
    return finest_config(run, [*own, *overrides])


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = file.metadata() or {}
            _check_format(path, text)
            return json.loads(text["metadata"])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged or was not written by mrcnf: {error}") from None


def _refuse_other_finest(origin: Path, metadata: dict[str, Any], finest: int) -> None:
    """Exact means of noise, or of a lattice, depend on how many pixels they are of."""
    model, field = metadata["model"], metadata["field"]
    known = model["resolutions"][-1]
    if model["pyramid"] == "integer" or known == finest:
        return
    for tied, name in (
        (model["dequantisation"] == "gaussian", "model.dequantisation = gaussian"),
        (field["lattice"], "field.lattice = true"),
    ):
        if tied:
            raise UserError(
                f"{origin} was trained with {name} for {known}×{known} images, and is of no use in "
                f"a model of {finest}×{finest}; model.pyramid = integer has no such tie"
            )


def _common_model(found: dict[Path, dict[str, Any]]) -> ModelConfig:
    """The configuration that all levels share, with the resolutions that are at hand."""
    resolutions = tuple(metadata["resolution"] for metadata in found.values())
    first_path, first = next(iter(found.items()))
    base = first["model"]["resolutions"][0]
    for path, metadata in found.items():
        theirs = metadata["model"]
        for key in ("channels", "nbits", "pyramid", "dequantisation", "base"):
            if theirs[key] != first["model"][key]:
                raise UserError(
                    f"{path} belongs to another model than {first_path}: {key} is {theirs[key]!r}, "
                    f"not {first['model'][key]!r}"
                )
        if metadata is not first and theirs["resolutions"][0] == metadata["resolution"]:
            raise UserError(
                f"{path} belongs to another model than {first_path}: it is a base level, which "
                "knows of no coarser one"
            )
        _refuse_other_finest(path, metadata, max(resolutions))
    steps = [base * 2**i for i in range(len(resolutions))]
    missing = [r for r in steps if r not in resolutions]
    if missing:
        raise UserError(
            f"levels {list(resolutions)} are trained, level {missing[0]} is missing; train it with "
            f"`mrcnf train CONFIG.toml --level {missing[0]}`"
        )
    shared = {**first["model"], "resolutions": resolutions}
    model = ModelConfig(**shared)
    *_, finest = (metadata["model"]["resolutions"][-1] for metadata in found.values())
    if model.dequantisation == "variational" and model.pyramid == "exact" and finest > model.finest:
        # Means of the noise that a finer level has learned are those of uniform noise.
        return dataclasses.replace(model, dequantisation="uniform")
    return model
