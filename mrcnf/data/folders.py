"""A folder of image files as images of one size: whole, shrunk, or cut into crops."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from mrcnf.data.imagefile import image_shape, read_image
from mrcnf.data.reduce import central
from mrcnf.data.streams import Stream
from mrcnf.errors import UserError

SPLITS = ("train", "test", "val")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")


def belongs(keys: Iterable[str], split: str, where: Path) -> np.ndarray:
    """Which keys are in `split`, bool (N,): the same nine of ten on every machine, for ever."""
    if split == "val":
        raise UserError(f"{where}: is divided into train and test only; choose one or supply val")
    tenth = (_digest(key) % 10 == 0 for key in keys)
    return np.fromiter(tenth, bool) == (split == "test")


def _digest(key: str) -> int:
    # The salt keeps this independent of splits that others made by hashing the same names.
    return int.from_bytes(hashlib.sha256(b"mrcnf " + os.fsencode(key)).digest())


def _of_split(names: list[str], split: str, where: Path) -> list[str]:
    """The files of a split: as `belongs`, but of two or more one is test and one is train."""
    wanted = belongs(names, split, where)
    if len(names) > 1 and (wanted.all() or not wanted.any()):
        # The smallest digest is the test's, the largest one the training's.
        first = min if (split == "test") != wanted[0] else max
        alone = first(range(len(names)), key=lambda i: _digest(names[i]))
        wanted[alone] = not wanted[alone]
    return [name for name, yes in zip(names, wanted, strict=True) if yes]


def stream(
    path: Path, split: str, resolution: int | None, crops: int = 0, limit: int | None = None
) -> Stream:
    """The images of a folder, in the order of their files' names; see `mrcnf.data.load`.

    Without `crops` each file is one image: as it is, or its central square averaged to
    `resolution`; otherwise it is cut, and `groups` counts the files.

    Raises UserError for folders without images, files too small, and, where no resolution makes
    them alike, files of several sizes.
    """
    if crops and resolution is None:
        raise UserError(f"{path}: say the resolution of the crops")
    top, names = _names(path, split)
    names = names if crops else names[:limit]
    shapes = [image_shape(top / name) for name in names]
    depth = max((shape[0] for shape in shapes), default=1)
    if depth == 1:
        depth = _channels(path)
    for name, (_, height, width) in zip(names, shapes, strict=True):
        if resolution and min(height, width) < resolution:
            raise UserError(f"{top / name}: {width}×{height} is smaller than the resolution "
                            f"{resolution}; remove the file or choose a smaller resolution")
        if not resolution and (height, width) != shapes[0][1:]:
            pair = ((names[0], shapes[0]), (name, (0, height, width)))
            sizes = " but ".join(f"{n} is {w}×{h}" for n, (_, h, w) in pair)
            raise UserError(f"{top}: {sizes}; give a resolution to make them alike")
    if resolution:
        height = width = resolution
    else:
        _, height, width = shapes[0] if shapes else (1, 1, 1)
    cut = [
        corners(name, *shape[1:], side=height, most=crops, overlap=split == "train")
        if crops else [] for name, shape in zip(names, shapes, strict=True)
    ]
    counts = [len(found) if crops else 1 for found in cut]
    ends = list(accumulate(counts))

    def parts(start: int) -> Iterator[np.ndarray]:
        for name, shape, found, count, end in zip(names, shapes, cut, counts, ends, strict=True):
            if end <= start:
                continue
            image = read_image(top / name).numpy()
            if image.shape != shape:
                raise UserError(f"{top / name}: changed while it was read; begin again")
            if crops:
                some = [image[:, y : y + height, x : x + width] for y, x in found]
            else:
                some = [central(image, resolution, top / name) if resolution else image]
            array = np.stack(some[max(0, start - (end - count)) :])
            yield np.broadcast_to(array, (len(array), depth, height, width))

    groups = np.repeat(np.arange(len(names)), counts) if crops else None
    total = ends[-1] if ends else 0
    files = tuple(top / name for name in names)
    whole = Stream((total, depth, height, width), parts, groups, files)
    return whole.first(limit)


def _images(top: Path) -> list[str]:
    """The names of image files below a folder, sorted."""
    files = (p.relative_to(top).as_posix() for p in top.rglob("*") if p.is_file())
    return sorted(n for n in files if n.lower().endswith(SUFFIXES) and "/." not in f"/{n}")


def _channels(path: Path) -> int:
    """3 if an image of any split has colours: grey ones then become colour in all splits."""
    tops = [path / split for split in SPLITS if (path / split).is_dir()] or [path]
    return max((image_shape(top / name)[0] for top in tops for name in _images(top)), default=1)


def photographs(path: Path) -> dict[str, tuple[int, int, int]]:
    """The image files of a folder, of all its splits, and their (C, H, W)."""
    found: dict[str, tuple[int, int, int]] = {}
    for split in ("train", "test"):
        top, names = _names(path, split)
        found |= {str(top / name): image_shape(top / name) for name in names}
    return found


def corners(
    name: str, height: int, width: int, *, side: int, most: int, overlap: bool
) -> list[tuple[int, int]]:
    """Upper left corners (y, x) of squares of `side` pixels in a photograph, in reading order.

    They lie on a grid in the photograph's middle: squares touch, or overlap by half. Where there
    are more than `most`, those are kept whose hash with the file's name is smallest, so the choice
    is the same everywhere and `most` = 8 gives some of the squares of `most` = 16.
    """
    step = max(1, side // 2) if overlap else side
    grid = [
        (y, x)
        for y in range((height - side) % step // 2, height - side + 1, step)
        for x in range((width - side) % step // 2, width - side + 1, step)
    ]
    if len(grid) > most:
        grid = sorted(sorted(grid, key=lambda corner: _digest(f"{name} {corner}"))[:most])
    return grid


def _names(path: Path, split: str) -> tuple[Path, list[str]]:
    """The folder that names are below, and those of a split, sorted."""
    divided = any((path / s).is_dir() for s in SPLITS)
    top = path / split if divided else path
    if not top.is_dir():
        raise UserError(f"{top}: there is no such folder; check the path or make it")
    names = _images(top)
    if not names:
        raise UserError(f"{top}: holds no image files (names ending in {' '.join(SUFFIXES)})")
    return top, names if divided else _of_split(names, split, path)
