"""What trained levels must agree on: to make one model, or to start from each other's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mrcnf.errors import UserError
from mrcnf.image import pyramids
from mrcnf.model.level import Level
from mrcnf.model.settings import FieldConfig, FlowConfig, ModelConfig

T = TypeVar("T")

SHARED = ("channels", "nbits", "pyramid", "dequantisation", "base")
"""Entries of ModelConfig that every level of a model has alike. The resolutions must fit together
as well, and `whiten` is each level's own: the axes that it found are in its file."""

# Weights are taken over by a level that has, besides SHARED, the same flow, field, whitening, place
# (base level or not) and learned noise or none: `check_weights`.


class Origin(NamedTuple):
    """What a trained level's file says that it is."""

    path: Path
    resolution: int
    model: ModelConfig
    field: FieldConfig
    flow: FlowConfig

    @classmethod
    def of(cls, path: Path, metadata: dict[str, Any]) -> Origin:
        """From a file's metadata.

        Raises:
            UserError: as `rebuilt`.
        """
        model = rebuilt(ModelConfig, metadata["model"], path)
        field = rebuilt(FieldConfig, metadata["field"], path)
        flow = rebuilt(FlowConfig, metadata.get("flow", {}), path)  # newer than some files
        return cls(path, metadata["resolution"], model, field, flow)

    @property
    def is_base(self) -> bool:
        return self.resolution == self.model.resolutions[0]


def rebuilt(kind: Callable[..., T], table: dict[str, Any], path: Path) -> T:
    """Settings from a file's metadata; those that are newer than the file have their defaults.

    Raises:
        UserError: it has settings, or values of them, that this version does not know.
    """
    lists = {name: tuple(value) for name, value in table.items() if isinstance(value, list)}
    try:
        return kind(**{**table, **lists})
    except (TypeError, UserError) as error:
        raise UserError(f"{path} was written by another version of mrcnf: {error}") from None


def common_model(origins: Sequence[Origin]) -> ModelConfig:
    """The configuration that levels share, with the resolutions that are at hand.

    Args:
        origins: of the levels, coarsest first.

    Raises:
        UserError: they are levels of different models, or one between them is missing.
    """
    first, *others = origins
    resolutions = tuple(origin.resolution for origin in origins)
    for origin in others:
        if differing := _differing(_shared(origin.model), _shared(first.model)):
            key, theirs, ours = differing
            raise UserError(
                f"{origin.path} belongs to another model than {first.path}: {key} is {theirs!r}, "
                f"not {ours!r}"
            )
        if origin.is_base:
            raise UserError(
                f"{origin.path} belongs to another model than {first.path}: it is a base level, "
                "which knows of no coarser one"
            )
    for origin in origins:
        check_finest(origin, resolutions[-1])
    base = first.model.resolutions[0]
    steps = [base * 2**i for i in range(len(resolutions))]
    missing = [r for r in steps if r not in resolutions]
    if missing:
        raise UserError(
            f"levels {list(resolutions)} are trained, level {missing[0]} is missing; train it with "
            f"`mrcnf train CONFIG.toml --level {missing[0]}`"
        )
    model = dataclasses.replace(first.model, resolutions=resolutions)
    below = origins[-1].model.finest > model.finest and not _own_noise(model)
    if below and model.dequantisation == "variational":
        # Means of the noise that a finer level has learned are those of uniform noise.
        return dataclasses.replace(model, dequantisation="uniform")
    return model


def check_finest(origin: Origin, finest: int) -> None:
    """Refuse a level for a model of another finest resolution than it was trained for, if tied.

    Exact means of noise, or of a lattice, depend on how many pixels they are of.

    Raises:
        UserError: the level is tied to the resolution that it was trained for.
    """
    model, known = origin.model, origin.model.finest
    if _own_noise(model) or known == finest:
        return
    for tied, name in (
        (model.dequantisation == "gaussian", "model.dequantisation = gaussian"),
        (origin.field.lattice, "field.lattice = true"),
    ):
        if tied:
            raise UserError(
                f"{origin.path} was trained with {name} for {known}×{known} images, and is of no "
                f"use in a model of {finest}×{finest}; model.pyramid = integer has no such tie"
            )


def check_weights(origin: Origin, learned_noise: bool, level: Level) -> None:
    """Refuse weights that are of no use to a level.

    Args:
        origin: of the weights.
        learned_noise: whether those of learned noise are among them.
        level: that is to start from them.

    Raises:
        UserError: the level is of another model or field.
    """
    theirs = _alone(origin.model, origin.flow, origin.field, origin.is_base, learned_noise)
    learns_noise = level.learned_noise is not None
    ours = _alone(level.model, level.flow_config, level.field, level.is_base, learns_noise)
    if differing := _differing(theirs, ours):
        key, found, wanted = differing
        raise UserError(
            f"{origin.path} cannot supply the starting weights: its {key} is {found!r}, "
            f"not {wanted!r}"
        )
    if origin.resolution == level.resolution:  # else units and lattice are fitted anew
        check_finest(origin, level.model.finest)


def _own_noise(model: ModelConfig) -> bool:
    """Whether each level has noise of its own, else means of the finest pixels'."""
    return pyramids.PYRAMIDS[model.pyramid].own_noise


def _shared(model: ModelConfig) -> dict[str, Any]:
    return {name: getattr(model, name) for name in SHARED}


def _alone(
    model: ModelConfig, flow: FlowConfig, field: FieldConfig, is_base: bool, learned_noise: bool
) -> dict[str, Any]:
    """All that decides whether a level's weights fit another one."""
    own = {"whiten": model.whiten, "base level": is_base, "learned noise": learned_noise}
    networks = {"flow": dataclasses.asdict(flow), "field": dataclasses.asdict(field)}
    return {**networks, **_shared(model), **own}


def _differing(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first entry that differs, and both of its values."""
    return next(((k, theirs[k], ours[k]) for k in ours if theirs[k] != ours[k]), None)
