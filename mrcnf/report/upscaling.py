"""Image files made larger: a PNG for each draw, a panel, and a line about each thing done."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mrcnf import seeds
from mrcnf.data.imagefile import read_image, save_image
from mrcnf.data.reduce import average
from mrcnf.errors import UserError
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.report import plot


def upscale_files(
    model: MultiResolutionFlow,
    paths: Sequence[Path],
    out: Path,
    *,
    level: int = 0,
    reduce: bool = False,
    draws: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Upscale image files into NAME-draw-K.png and NAME-panel.png in `out`, one after another.

    Args:
        paths: images of any sizes.
        level: resolution of the level at whose scale the images are: the results have
            finest / level times their sides. 0: see `choose_level`.
        reduce: average the images by finest / level first, and show them as the truth.
        draws: results per image.
        temperature: standard deviation of the latent noise.
        seed: of the noise, the same for every image.

    Yields:
        lines that say what was done to each image, and how closely its draws average back to it.

    Raises:
        UserError: before anything is written, where results would overwrite each other or one
            of the images, or the model has no such level; later, where an image cannot be read.
    """
    if draws < 1:
        raise UserError(f"draws must be at least 1, got {draws}")
    _refuse_level(model, level)
    _refuse_clashes(paths, out, draws)
    for path in paths:
        image, truth = read_image(path, channels=model.config.channels)[None], None
        scale = level or choose_level(model.resolutions, *image.shape[2:], reduced=reduce)
        if reduce:
            truth, image, lines = _reduced(image, model.config.finest // scale, path)
            yield from lines
        unit = model.multiple_at(scale)
        tall, wide = (unit * math.ceil(side / unit) for side in image.shape[2:])
        if (tall, wide) != tuple(image.shape[2:]):
            yield f"{path}: padded from {_size(image)} to {wide}×{tall}, the results cropped again"
        generator = seeds.generator(seed, model.device)
        results = torch.stack(
            [
                model.upscale(
                    image.to(model.device), scale, temperature=temperature, generator=generator
                ).cpu()
                for _ in range(draws)
            ]
        )
        for k, result in enumerate(results):
            save_image(out / _draw(path, k), result[0])
        plot.upscaling_panel(out / _panel(path), image, results, truth)
        difference = max(consistency(image, result) for result in results)
        yield (
            f"{path}: {draws} draws of {_size(results)}, from level {scale}'s scale, in {out}; "
            f"averaged back to {_size(image)} they differ from the input by at most "
            f"{difference:.2f} grey levels"
        )


def choose_level(resolutions: Sequence[int], height: int, width: int, *, reduced: bool) -> int:
    """The level at whose scale an image is taken to be when nobody says.

    Args:
        resolutions: of the model's levels, coarsest first, at least two.
        height, width: of the image in pixels.
        reduced: it is to be averaged down first, so it has the finest level's scale.

    Returns:
        the level that makes images of this size, if below the finest; otherwise the level below
        the finest, whose scale is half of the finest.
    """
    *lower, _ = resolutions
    return height if height == width and height in lower and not reduced else lower[-1]


def consistency(inputs: Tensor, draws: Tensor) -> float:
    """Largest difference, in grey levels, between block means of draws and their inputs.

    Args:
        inputs: uint8 (N, C, h, w).
        draws: uint8 (N, C, f·h, f·w) for a whole f.
    """
    factor = draws.shape[-1] // inputs.shape[-1]
    means = F.avg_pool2d(draws.double(), factor)
    return float((means - inputs.double()).abs().max())


def _reduced(image: Tensor, factor: int, path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """The image cropped to whole boxes of factor × factor pixels, its average, and what to say."""
    height, width = image.shape[2] // factor, image.shape[3] // factor
    if not height or not width:
        raise UserError(f"{path} is {_size(image)}: it cannot be reduced by {factor}")
    truth, lines = image[..., : height * factor, : width * factor], []
    if truth.shape != image.shape:
        lines.append(f"{path}: cropped from {_size(image)} to {_size(truth)}, right and bottom")
    small = average(truth, height, width)
    return truth, small, [*lines, f"{path}: reduced from {_size(truth)} to {_size(small)}"]


def _refuse_level(model: MultiResolutionFlow, level: int) -> None:
    *lower, finest = model.resolutions
    if not lower:
        raise UserError(f"the model has the level {finest} alone: nothing is finer")
    if level and level not in lower:
        raise UserError(
            f"level {level} is none of those below the finest, {finest}: choose one of {lower}"
        )


def _refuse_clashes(paths: Sequence[Path], out: Path, draws: int) -> None:
    """Compare file names as file systems that ignore case do."""
    given = {_folded(path): path for path in paths}
    made: dict[Path, Path] = {}
    for path in paths:
        for name in (*(_draw(path, k) for k in range(draws)), _panel(path)):
            key = _folded(out / name)
            if key in made:
                raise UserError(
                    f"{made[key]} and {path} would both be written to {out / name}; rename one "
                    "of them, or upscale them into different folders"
                )
            if key in given:
                raise UserError(
                    f"{path} would be written over {given[key]}; choose another --out"
                )
            made[key] = path


def _folded(path: Path) -> Path:
    return Path(os.path.realpath(path).casefold())


def _draw(path: Path, k: int) -> str:
    return f"{path.stem}-draw-{k + 1}.png"


def _panel(path: Path) -> str:
    return f"{path.stem}-panel.png"


def _size(images: Tensor) -> str:
    return f"{images.shape[-1]}×{images.shape[-2]}"
