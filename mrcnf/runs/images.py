"""The images of a run: opened at the model's finest resolution, and agreeing with the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mrcnf import plugins
from mrcnf.data import datasets
from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.model.settings import ModelConfig
from mrcnf.runs.config import DataConfig
from mrcnf.runs.extend import finest_config, finest_folder


def open_images(
    settings: DataConfig,
    model: ModelConfig,
    split: str,
    *,
    run: Path | str | None = None,
    trust: bool = False,
) -> Images:
    """The images of a configuration at the model's finest resolution.

    Args:
        settings: what to open; its limit holds for the "train" split only.
        model: of the level or run; with channels 0 ("as the data") images of any number of
            channels pass, so hand over a trained level's, or what `match_model` answered for
            the training images, when opening test images.
        split: "train" or "test".
        run: a trained run that the settings are from, whose own data source is looked for in it.
        trust: run the code of such a source, where it is the run that names it.

    Returns:
        uint8 (N, C, R, R), R the finest resolution.

    Raises:
        UserError: there are no such images, or they disagree with the model.
    """
    folders = []
    # Another name, from the command line, is the user's own and means what lies there.
    if run is not None and settings.name == finest_config(run).data.name:
        plugins.require_trust([settings.name], run, trust)
        folders = [finest_folder(run)]
    with plugins.beside(*folders):
        images = datasets.load(
            settings.name,
            split,
            root=settings.root,
            resolution=model.finest,
            limit=(settings.limit or None) if split == "train" else None,
            download=settings.download,
            crop=settings.crop,
            options=settings.options,
        )
    match_model(model, images)
    return images


def match_model(model: ModelConfig, images: Images) -> ModelConfig:
    """The model's configuration with the data's channels in place of 0.

    Raises:
        UserError: the channels differ, or the images are not R×R, R the finest resolution.
    """
    _, channels, height, width = images.shape
    if model.channels not in (0, channels):
        raise UserError(
            f"{images.name} has {channels} channel(s) but model.channels is {model.channels}"
        )
    if (height, width) != (model.finest, model.finest):
        raise UserError(
            f"{images.name} images are {height}×{width} but the finest of model.resolutions is "
            f"{model.finest}"
        )
    return dataclasses.replace(model, channels=channels)
