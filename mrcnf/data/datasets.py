"""Where images come from: published sets, folders, archives and memory maps, all as uint8."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mrcnf import plugins
from mrcnf.data import folders, published, streams
from mrcnf.data.folders import SPLITS, belongs
from mrcnf.data.formats import open_npz, read_array
from mrcnf.data.mapped import Mapped, beside, describe, digest
from mrcnf.data.streams import Stream
from mrcnf.errors import UserError

T = TypeVar("T", "Images", Stream)

NAMES = ("photos", *published.PUBLISHED, "folder:PATH", "npz:PATH", "npy:PATH",
         "MODULE:OBJECT of your own")  # fmt: skip


class Images:
    """Images, uint8 (N, C, H, W), C being 1 or 3: in memory, or in a file until they are asked for.

    Args:
        pixels: on the CPU; or a memory map.
        name, split: where they are from, for messages.
        groups: int64 (N,) or None; gives images of one source photograph the same number: they are
            correlated, so a bootstrap draws photographs.
    """

    def __init__(
        self, pixels: Tensor | Mapped, name: str, split: str, groups: Tensor | None = None
    ) -> None:
        self._source, self.name, self.split, self.groups = pixels, name, split, groups

    @property
    def mapped(self) -> bool:
        """Whether they are in a file, so that `take` is better than `pixels`."""
        return isinstance(self._source, Mapped)

    @cached_property
    def pixels(self) -> Tensor:
        """All of them. Those of a memory map must not be written to; that would end the process."""
        return self._source.tensor() if isinstance(self._source, Mapped) else self._source

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        n, c, h, w = self._source.shape
        return n, c, h, w

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal digest of shape and pixels; name, split and groups do not enter."""
        if isinstance(self._source, Mapped):
            return self._source.sha256
        return digest(self.stream())

    def take(self, index: Tensor, *, pinned: bool = False) -> Tensor:
        """The images of the numbers `index` (n,), uint8 (n, C, H, W), copied.

        `pinned`: of a memory map, into page-locked memory, from where a GPU takes them faster.

        Raises UserError if a mapped file has changed since it was opened.
        """
        if isinstance(self._source, Mapped):
            return self._source.take(index.numpy(), pinned=pinned)
        return self.pixels[index]

    def first(self, limit: int | None) -> Images:
        """The first that many; all for None."""
        groups = None if self.groups is None else self.groups[:limit]
        source = self._source
        some = source.first(limit) if isinstance(source, Mapped) else source[:limit]
        return Images(some, self.name, self.split, groups)

    def stream(self) -> Stream:
        """The images a part at a time."""
        groups = None if self.groups is None else self.groups.numpy()
        if isinstance(self._source, Mapped):
            return replace(self._source.stream(), groups=groups)
        return streams.of_array(self.pixels.numpy(), groups)

    def __len__(self) -> int:
        return self.shape[0]


def load(
    name: str, split: str = "train", *, root: str | Path = "", resolution: int | None = None,
    limit: int | None = None, download: bool = False, crop: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Images:
    """Reads one split, `train`, `test` or `val`, of a data set; `NAMES` lists the names.

    `photos`: crops of PyWavelets' three grey photographs; `_photos` says which regions.
    `cifar10`, `cifar100`, `svhn`, `fashion-mnist`: the published files (`train` and `test`).
    `imagenet32`, `imagenet64`: the new release of downsampled ImageNet (npz, anti-aliased; bits/dim
    differ from the withdrawn one's); its validation images are both `test` and `val`.
    `folder:PATH`: the image files below PATH in the order of their names; PATH/train, PATH/test,
    PATH/val if one exists, otherwise a hash of the name relative to PATH makes one file in ten
    `test`, and of two files or more at least one. Grey files are repeated to three
    channels if any file of any split has colours.
    `npz:PATH`: a folder of train.npz, test.npz, val.npz; or one file, where a hash of the index, or
    of the photograph, makes one in ten `test`. Arrays: `images` or `data`, uint8 (N,H,W,C), (N,H,W)
    or (N,3·H·H), and possibly `photo` (N,), names or numbers that become `groups`.
    `npy:PATH`: a folder of train.npy, test.npy, val.npy; or one file, which is the split that
    `mrcnf pack` made it of, or else divided as one npz. Arrays: uint8 (N,C,H,W), (N,H,W,C) or
    (N,H,W), and possibly names or numbers (N,) of photographs in train.groups.npy and so on. They
    stay in the file, memory-mapped, and `Images.take` reads those that are wanted.
    `MODULE:OBJECT`: a function of your own, called as `f(split, resolution, **options)`. It answers
    Images, or uint8 (N,C,H,W) as a tensor or an array, at `resolution` or 2^k times as large;
    `resolution` is None where none was asked for. Memory-mapped Images that have it stay so.

    `root`: folder of the published files; by default $MRCNF_DATA, otherwise ./data.
    `resolution` (pixels): images 2^k times as large are averaged over 2^k×2^k pixels, rounding
    halves up once (`mrcnf.data.reduce`); 28×28 images get borders of zeros to 32×32 first where
    `resolution` divides 32. Files of a folder are cropped to their central square and averaged by
    the same rule, whatever their size. `photos` are cut at `resolution` (default 32, at most 128).
    `npy:` files have it, or are packed anew.
    `crop`: cut each file of a folder into at most that many squares of `resolution` pixels instead,
    at the file's own resolution, photograph by photograph, and number the photographs in `groups`.
    Squares touch; those of `train` may also overlap by half (`mrcnf.data.folders.corners` says
    which are chosen; there is no randomness in it).
    `limit`: only the first that many images (those of `photos` alternate between photographs).
    `download`: fetch what is missing into `root` and check its published MD5 (needs the extra
    `data`).

    Raises UserError for unknown names and splits, missing or damaged files, arrays of another
    shape or type, sizes that do not lead to `resolution`, and splits without images.
    """
    kind, _, place = name.partition(":")
    _check(split, resolution, limit, crop, kind)
    if kind == "npy" and place:
        images = _mapped(name, Path(place).expanduser(), split, resolution)
        return _some(images, name, split).first(limit)
    if plugins.is_own(name):
        own = _own(name, split, resolution, options or {})
        if isinstance(own, Images) and own.shape[2:] == (resolution or own.shape[2],) * 2:
            return _some(own, name, split).first(limit)
        stream = _some(_own_stream(own, name, resolution), name, split).first(limit)
    else:
        stream = open_stream(
            name, split, root=root, resolution=resolution, limit=limit, download=download,
            crop=crop,
        )  # fmt: skip
    groups = None if stream.groups is None else torch.from_numpy(stream.groups)
    return Images(torch.from_numpy(stream.array()), name, split, groups)


def open_stream(
    name: str, split: str = "train", *, root: str | Path = "", resolution: int | None = None,
    limit: int | None = None, download: bool = False, crop: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Stream:
    """What `load` reads, a part at a time; `npy:` files may be reduced, too."""
    kind, _, place = name.partition(":")
    path = Path(place).expanduser()
    _check(split, resolution, limit, crop, kind)
    if name == "photos":
        stream = _photos(split, resolution or 32)
    elif name in published.PUBLISHED:
        base = Path(root or os.environ.get("MRCNF_DATA") or "data").expanduser()
        stream = published.stream(name, split, base, resolution, limit, download)
    elif kind == "folder" and place:
        stream = folders.stream(path, split, resolution, crop, limit)
    elif kind == "npz" and place:
        stream = _npz(path, split).halved(resolution, path)
    elif kind == "npy" and place:
        images = _mapped(name, path, split, None)
        stream = images.stream().halved(resolution, path)
    elif plugins.is_own(name):
        stream = _own_stream(_own(name, split, resolution, options or {}), name, resolution)
    else:
        folder = f"; for the images in that folder say folder:{name}" if Path(name).is_dir() else ""
        raise UserError(f"data name '{name}' is unknown; choose one of {', '.join(NAMES)}{folder}")
    return _some(stream, name, split).first(limit)


def _some(images: T, name: str, split: str) -> T:
    """What was found, unless it is nothing."""
    if not len(images):
        raise UserError(f"{name}: split '{split}' has no images; add some or choose another split")
    return images


def _check(split: str, resolution: int | None, limit: int | None, crop: int, kind: str) -> None:
    if split not in SPLITS:
        raise UserError(f"data split '{split}' is unknown; choose one of {', '.join(SPLITS)}")
    if (resolution is not None and resolution < 1) or (limit is not None and limit < 1):
        raise UserError(f"resolution {resolution}, limit {limit}: must be at least 1")
    if crop < 0 or (crop and kind != "folder"):
        raise UserError(f"crop {crop}: of folder:PATH alone, and at least 0; leave it at 0")


def _photos(split: str, resolution: int) -> Stream:
    """Crops (N, 1, resolution, resolution) of PyWavelets' camera, ascent and aero, and groups (N,).

    Each photograph, 512×512, is divided into 4×4 blocks of 128×128: blocks (row, column) (0,1),
    (1,3), (2,0), (3,2) are `test`, (0,3) and (3,0) `val`, the other ten `train`. Crops lie wholly
    in blocks of their split; those of `train` start every 8 pixels, the others do not overlap.
    """
    try:
        import pywt  # here: everything else does without
    except ImportError as error:
        raise UserError("photos need PyWavelets: pip install PyWavelets") from error
    held = {(0, 1): "test", (1, 3): "test", (2, 0): "test", (3, 2): "test",
            (0, 3): "val", (3, 0): "val"}
    if resolution > 128:
        raise UserError(f"photos: crops have at most 128×128 pixels; {resolution} is too much")
    starts = range(0, 512 - resolution + 1, 8 if split == "train" else resolution)
    ends = (0, resolution - 1)
    corners = [
        (y, x) for y in starts for x in starts
        if all(held.get(((y + v) // 128, (x + u) // 128), "train") == split
               for v in ends for u in ends)
    ]
    photographs = np.stack([pywt.data.camera(), pywt.data.ascent(), pywt.data.aero()])
    crops = [photographs[:, y : y + resolution, x : x + resolution] for y, x in corners]
    pixels = np.array(crops, np.uint8).reshape(-1, 1, resolution, resolution)
    return streams.of_array(pixels, np.tile(np.arange(len(photographs)), len(corners)))


def _own(
    name: str, split: str, resolution: int | None, options: Mapping[str, Any]
) -> Images | Stream:
    """What a user's own function answers: as Images where they are mapped, and stay in the file."""
    found = plugins.call(name, "data.name", split, resolution, **options)
    groups: torch.Tensor | None = None
    if isinstance(found, Images):
        if found.mapped:
            return Images(found._source, name, split, found.groups)
        groups, found = found.groups, found.pixels
    pixels = found.cpu().numpy() if isinstance(found, torch.Tensor) else found
    if not isinstance(pixels, np.ndarray):
        raise UserError(
            f"data.name '{name}' answers a {type(found).__name__}; Images, a tensor or an array "
            "is needed"
        )
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[1] not in (1, 3):
        raise UserError(
            f"data.name '{name}' answers {pixels.dtype} of shape {pixels.shape}; uint8 "
            "(N, C, H, W) is needed, C being 1 or 3"
        )
    if groups is not None and groups.shape != (len(pixels),):
        raise UserError(f"data.name '{name}' answers groups of shape {tuple(groups.shape)} for "
                        f"{len(pixels)} images")  # fmt: skip
    return streams.of_array(pixels, None if groups is None else groups.cpu().numpy())


def _own_stream(own: Images | Stream, name: str, resolution: int | None) -> Stream:
    stream = own.stream() if isinstance(own, Images) else own
    code = tuple(plugins.sources([name]).values())
    return replace(stream.halved(resolution, Path(name)), files=(*stream.files, *code))


def _npz(path: Path, split: str) -> Stream:
    divided = path.is_dir()
    stream, photo = open_npz(path / f"{split}.npz" if divided else path)
    rows, groups = _division(len(stream), photo, None if divided else split, path)
    stream = replace(stream, groups=groups)
    return stream if rows is None else stream.chosen(rows)


def _mapped(name: str, path: Path, split: str, resolution: int | None) -> Images:
    divided = path.is_dir()
    file = path / f"{split}.npy" if divided else path
    source, known = Mapped(file), describe(file)
    if resolution and source.shape[2:] != (resolution, resolution):
        height, width = source.shape[2:]
        raise UserError(f"{file}: images are {width}×{height}, not {resolution}×{resolution}; pack "
                        f"them so: mrcnf pack npy:{path} --resolution {resolution} --out FILE.npy")
    if not divided and known and known.split != split:
        raise UserError(f"{file} is of the split {known.split}; pack {split} beside it, as "
                        f"{split}.npy, and name the folder")
    place = beside(file, ".groups.npy")
    photo = read_array(place) if place.is_file() else None
    if photo is not None and (photo.shape != (len(source),) or photo.dtype.kind not in "USiu"):
        raise UserError(f"{place}: must hold one name or number for each of the {len(source)} "
                        f"images of {file.name}")
    rows, groups = _division(len(source), photo, None if divided or known else split, path)
    if rows is not None:
        source, groups = source.chosen(rows), None if groups is None else groups[rows]
    return Images(source, name, split, None if groups is None else torch.from_numpy(groups))


def _division(
    count: int, photo: np.ndarray | None, split: str | None, path: Path
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which of so many images are in a split, bool (N,), None for all; and their groups."""
    if photo is None:
        return None if split is None else belongs(map(str, range(count)), split, path), None
    names, groups = np.unique(photo, return_inverse=True)
    groups = groups.astype(np.int64)
    return None if split is None else belongs(map(str, names), split, path)[groups], groups
