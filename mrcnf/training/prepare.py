"""A level before its first step: built, standardised, and refused where settings do not fit."""

from __future__ import annotations

import torch

from mrcnf import seeds
from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.runs.config import Config
from mrcnf.runs.images import match_model

STANDARDISE_ON = 4096
"""Images that a level's units are fitted to, at most."""


def prepare_level(config: Config, resolution: int, images: Images) -> Level:
    """An untrained level, standardised on training images, on the CPU.

    Args:
        config: with the level's own settings merged in.
        images: of any number of channels where `model.channels` is 0.

    Raises:
        UserError: the images do not fit the model, or the settings each other.
    """
    model = match_model(config.model, images)
    generator = seeds.generator(seeds.seed_of(config.train.seed, resolution, "weights"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        level = Level(
            model, resolution, config.field, config.solver, config.trace, config.flow
        )
    standardise(level, config, images, generator)
    _refuse_unfit(config, level)
    return level


def standardise(
    level: Level,
    config: Config,
    images: Images,
    generator: torch.Generator | None = None,
    *,
    anew: bool = True,
) -> None:
    """Fit a level's units to training images: see `Level.fit_standardisation`."""
    if generator is None:
        seed = seeds.seed_of(config.train.seed, level.resolution, "units")
        generator = seeds.generator(seed)
    chosen = torch.randperm(len(images), generator=generator)[:STANDARDISE_ON]
    x, _ = dequantise(
        images.take(chosen), nbits=level.model.nbits, kind=level.model.pixel_noise,
        generator=generator,
    )  # fmt: skip
    level.fit_standardisation(x, anew=anew)


def _refuse_unfit(config: Config, level: Level) -> None:
    for section in ("trace", "train_trace"):
        if getattr(config, section).method == "calibrated":
            raise UserError(
                f"{section}.method = calibrated: what it needs is fitted to a trained level; train "
                "with another, and set it where you evaluate"
            )
    crop, finest = config.train.crop, level.model.finest
    if level.flow.tied_to_size and crop not in (0, finest):
        raise UserError(
            f"train.crop {crop}: a field with attention serves at the size alone that it is "
            "trained on; set train.crop = 0 or field.attention = false"
        )
    if crop % level.multiple or crop > finest:
        raise UserError(
            f"train.crop {crop} must be a multiple of {level.multiple} and at most {finest} for "
            f"level {level.resolution}"
        )
    if config.train.objective == "flow-matching":
        level.flow.check_velocity()
