"""Whether a model can tell which images are of the kind that it was trained on: scores, AUROC.

The higher a score, the more an image looks like training data. Images of another kind often
cost *fewer* bits (Nalisnick et al., arXiv 1810.09136); scores that allow for it are here too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrcnf import seeds
from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.image.noise import check_images
from mrcnf.measure.classical import available, bits_of_files
from mrcnf.measure.evaluate import bits_by_level
from mrcnf.model.level import Level, check_size
from mrcnf.runs.ranges import Choice

CODECS = ("JPEG XL, effort 7", "PNG")
"""What complexity is measured with: the first that is installed."""
BINS = 40
"""Of histograms."""


@dataclass
class Detection:
    """How well scores tell images of one set from those of another."""

    data: str
    against: str
    images: list[int]
    """How many of either."""
    auroc: dict[str, float]
    """By score: the probability that an image of `data` has the higher one, ties counting half."""
    interval: dict[str, list[float]]
    """By score: where the middle 95% of bootstrap resamples lie."""
    bpd: list[float]
    """Mean bits per dimension of either."""
    histograms: dict[str, dict[str, list[float]]]
    """By score: edges, and the counts inside and outside."""
    codec: str
    """That complexity is measured with."""
    typical: float | None
    """Mean bits per dimension of training images, which typicality is the distance from."""
    left_out: str
    """Scores that could not be had, and why, or ""."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            f"{self.images[0]} images of {self.data} ({self.bpd[0]:.3f} bits/dim) against "
            f"{self.images[1]} of {self.against} ({self.bpd[1]:.3f})"
        ]
        for score, area in self.auroc.items():
            low, high = self.interval[score]
            rows.append(f"  {score:<12} AUROC {area:.4f}   95% interval {low:.4f} to {high:.4f}")
        rows.append(f"  complexity by {self.codec}, {self.seconds:.1f} s")
        return "\n".join(rows + ([f"  {self.left_out}"] if self.left_out else []))


def names(levels: Iterable[Level]) -> tuple[str, ...]:
    """What `scores` can give for these levels.

    likelihood: minus bits per dimension; level-R: minus level R's share of them; complexity: bits
    per dimension of a lossless file minus the model's (Serrà et al. 2020, arXiv 1909.11480);
    typicality: minus the distance of bits per dimension from those of training images
    (Nalisnick et al. 2019, arXiv 1906.02994, of single images).
    """
    own = (f"level-{level.resolution}" for level in levels)
    return ("likelihood", *own, "complexity", "typicality")


def scores(
    levels: Iterable[Level],
    images: Tensor,
    *,
    typical: float | None = None,
    wanted: Sequence[str] = (),
    codec: str = "",
    batch: int = 100,
    draws: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Scores of images, (N,) each, by name: see `names`.

    Args:
        levels: a model, or some of its levels, which the bits are of.
        images: uint8 (N, C, H, W).
        typical: mean bits per dimension of training images; without it there is no typicality.
        wanted: names of scores; by default all that can be had.
        codec: key of `classical.FORMATS`; by default the first of `CODECS` that is installed.
        batch, draws, seed, progress: as of `evaluate`.

    Raises:
        UserError: an unknown score, typicality without `typical`, or images that are not such as
            the model is of.
    """
    levels = list(levels)
    wanted = check_names(levels, wanted) or _possible(levels, typical)
    if typical is None and "typicality" in wanted:
        raise UserError("typicality is a distance from training images, of which none were given")
    shares = bits_by_level(
        levels, images, batch=batch, draws=draws, seed=seed, progress=progress
    ).numpy()
    bits = shares.sum(0)
    found: dict[str, np.ndarray] = {"likelihood": -bits}
    found |= {f"level-{level.resolution}": -shares[i] for i, level in enumerate(levels)}
    if "complexity" in wanted:
        files = bits_of_files(images.cpu(), codec or best_codec(), progress=progress)
        found["complexity"] = files.numpy() - bits
    if typical is not None:
        found["typicality"] = -np.abs(bits - typical)
    return {name: found[name] for name in wanted}


def check_names(levels: Iterable[Level], wanted: Sequence[str]) -> tuple[str, ...]:
    """The names, each once; a UserError for those that no score has."""
    known = Choice(names(levels))
    for name in wanted:
        known.check("score", name)
    return tuple(dict.fromkeys(wanted))


def best_codec() -> str:
    """The first of `CODECS` that is installed."""
    return next(codec for codec in CODECS if codec in available()[0])


def auroc(negative: np.ndarray, positive: np.ndarray) -> float:
    """The area under the receiver operating characteristic: P(positive > negative), ties half.

    Args:
        negative, positive: scores (M,) and (N,); infinite ones are compared like any others.

    Raises:
        UserError: no scores on a side, or nan among them.

    >>> auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    0.875
    """
    values, (low, high) = _placed(negative, positive)
    return _area(np.bincount(low, minlength=values), np.bincount(high, minlength=values))


def interval(
    negative: np.ndarray,
    positive: np.ndarray,
    *,
    groups: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap's interval of `auroc` (Efron & Tibshirani 1993, §13.3).

    Images of either side are resampled by themselves, or the photographs that they are of.

    Args:
        groups: numbers (M,) and (N,) that images of one source share, or None.
        level: how much of the resamples the interval holds.

    Raises:
        UserError: as `auroc`.
    """
    values, sides = _placed(negative, positive)
    random, areas = np.random.default_rng(seed), []
    for _ in range(resamples):
        weights = [_weights(len(side), own, random)
                   for side, own in zip(sides, groups, strict=True)]  # fmt: skip
        areas.append(_area(*map(np.bincount, sides, weights, (values, values))))
    tail = (1 - level) / 2
    low, high = np.quantile(areas, (tail, 1 - tail))
    return float(low), float(high)


def _placed(negative: np.ndarray, positive: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """How many different scores there are, and which of them, in order, each image has."""
    if not len(negative) or not len(positive):
        raise UserError("the area needs scores on both sides")
    both = np.concatenate((negative, positive))
    if np.isnan(both).any():
        raise UserError("there are scores that are not numbers (nan); check weights and images")
    found, place = np.unique(both, return_inverse=True)
    return len(found), [place[: len(negative)], place[len(negative) :]]


def _area(low: np.ndarray, high: np.ndarray) -> float:
    """The area from how often each score, in order, occurs: Mann & Whitney's U over M·N."""
    below = np.cumsum(low) - low / 2
    return float((high * below).sum() / (low.sum() * high.sum()))


def _weights(n: int, groups: np.ndarray | None, random: np.random.Generator) -> np.ndarray:
    """How often each of n images is in a resample; those of a group all equally often."""
    units = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(units.max()) + 1
    return np.bincount(random.integers(count, size=count), minlength=count)[units]


def detect(
    levels: Iterable[Level],
    inside: Images,
    outside: Images,
    *,
    wanted: Sequence[str] = (),
    training: Tensor | None = None,
    left_out: str = "",
    batch: int = 100,
    draws: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Detection:
    """Scores of two sets of images, and how well they tell them apart.

    Args:
        inside, outside: images like those that the model was trained on, and others.
        wanted: names of scores; by default all that can be had.
        training: uint8 training images, for typicality.
        left_out: what to say of scores that cannot be had.
        batch, draws, seed, progress: as of `evaluate`.

    Raises:
        UserError: as `scores`.
    """
    levels, started = list(levels), time.perf_counter()
    wanted = check_names(levels, wanted)
    how: dict[str, Any] = {"batch": batch, "draws": draws, "progress": progress}
    for images in (inside, outside):
        check_images(images.pixels, levels[0].model.channels)
        check_size(levels, images.pixels.shape[2:])
    typical = None
    if training is not None:
        typical = float(bits_by_level(levels, training, seed=seed, **how).sum(0).mean())
    codec = best_codec()
    how |= {"wanted": tuple(dict.fromkeys(("likelihood", *(wanted or _possible(levels, typical)))))}
    found = [
        scores(levels, images.pixels, typical=typical, codec=codec, seed=seed + i, **how)
        for i, images in enumerate((inside, outside))
    ]
    groups = tuple(_many(images.groups) for images in (outside, inside))
    shown = wanted or tuple(found[0])
    return Detection(
        data=f"{inside.name} {inside.split}".strip(),
        against=f"{outside.name} {outside.split}".strip(),
        images=[len(inside), len(outside)],
        auroc={name: auroc(found[1][name], found[0][name]) for name in shown},
        interval={
            name: list(
                interval(found[1][name], found[0][name], groups=(groups[0], groups[1]), seed=seed)
            )
            for name in shown
        },
        bpd=[-float(side["likelihood"].mean()) for side in found],
        histograms={name: _histogram(found[0][name], found[1][name]) for name in shown},
        codec=codec,
        typical=typical,
        left_out=left_out,
        seconds=time.perf_counter() - started,
    )


def _possible(levels: list[Level], typical: float | None) -> tuple[str, ...]:
    return tuple(n for n in names(levels) if n != "typicality" or typical is not None)


def _many(groups: Tensor | None) -> np.ndarray | None:
    """Groups, where there are enough of them to resample, as in `evaluate.mean_and_error`."""
    return None if groups is None or len(groups.unique()) < 8 else groups.numpy()


def _histogram(inside: np.ndarray, outside: np.ndarray) -> dict[str, list[float]]:
    edges = np.histogram_bin_edges(np.concatenate((inside, outside)), BINS)
    counts = (np.histogram(side, edges)[0].tolist() for side in (inside, outside))
    return {"edges": edges.tolist(), **dict(zip(("inside", "outside"), counts, strict=True))}


def constant(n: int, channels: int, side: int, *, seed: int = 0) -> Tensor:
    """n images of one colour each, drawn uniformly: uint8 (n, C, side, side)."""
    generator = seeds.generator(seed)
    colours = torch.randint(0, 256, (n, channels, 1, 1), generator=generator)
    return colours.to(torch.uint8).expand(-1, -1, side, side).contiguous()


def noise(n: int, channels: int, side: int, *, seed: int = 0) -> Tensor:
    """n images of independent uniform pixels: uint8 (n, C, side, side)."""
    generator = seeds.generator(seed)
    return torch.randint(0, 256, (n, channels, side, side), generator=generator).to(torch.uint8)


def shuffled(images: Tensor, patch: int, *, seed: int = 0) -> Tensor:
    """Images whose patches of patch × patch pixels change places, each image's in its own way.

    Args:
        images: uint8 (N, C, H, W).

    Raises:
        UserError: H or W is no multiple of the patch, or there is but one.
    """
    n, channels, height, width = images.shape
    if patch < 1 or height % patch or width % patch or height * width <= patch**2:
        raise UserError(
            f"patches of {patch}×{patch} pixels: images of {height}×{width} are not made of "
            "several such; choose a smaller divisor of both sides"
        )
    generator = seeds.generator(seed)
    down, across = height // patch, width // patch
    cells = images.reshape(n, channels, down, patch, across, patch).permute(0, 2, 4, 1, 3, 5)
    cells = cells.reshape(n, down * across, channels, patch, patch)
    order = torch.rand(n, down * across, generator=generator).argsort(1)
    cells = cells[torch.arange(n)[:, None], order].reshape(n, down, across, channels, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
