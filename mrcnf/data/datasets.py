"""Where images come from: published sets, folders and archives, all as uint8."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrcnf import plugins
from mrcnf.data import published
from mrcnf.data.formats import read_npz
from mrcnf.data.imagefile import read_image
from mrcnf.data.reduce import central, halve
from mrcnf.errors import UserError

SPLITS = ("train", "test", "val")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
NAMES = ("photos", *published.PUBLISHED, "folder:PATH", "npz:PATH", "MODULE:OBJECT of your own")


@dataclass(frozen=True, eq=False)
class Images:
    """Images in memory: `pixels` uint8 (N, C, H, W) on the CPU, C being 1 or 3.

    `groups`, int64 (N,) or None, gives images of one source photograph the same number: they are
    correlated, so a bootstrap draws photographs.
    """

    pixels: torch.Tensor
    name: str
    split: str
    groups: torch.Tensor | None = None

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of shape and pixels; name, split and groups do not enter."""
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        digest.update(self.pixels.contiguous().numpy().data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)


def load(
    name: str, split: str = "train", *, root: str | Path = "", resolution: int | None = None,
    limit: int | None = None, download: bool = False, options: Mapping[str, Any] | None = None,
) -> Images:
    """Reads one split, `train`, `test` or `val`, of a data set; `NAMES` lists the names.

    `photos`: crops of PyWavelets' three grey photographs; `_photos` says which regions.
    `cifar10`, `cifar100`, `svhn`, `fashion-mnist`: the published files (`train` and `test`).
    `imagenet32`, `imagenet64`: the new release of downsampled ImageNet (npz, anti-aliased; bits/dim
    differ from the withdrawn one's); its validation images are both `test` and `val`.
    `folder:PATH`: the image files below PATH in the order of their names; PATH/train, PATH/test,
    PATH/val if one exists, otherwise a hash of the name relative to PATH makes one file in ten
    `test`. Grey files among colour ones are repeated to three channels.
    `npz:PATH`: a folder of train.npz, test.npz, val.npz; or one file, where a hash of the index, or
    of the photograph, makes one in ten `test`. Arrays: `images` or `data`, uint8 (N,H,W,C), (N,H,W)
    or (N,3·H·H), and possibly `photo` (N,), names or numbers that become `groups`.
    `MODULE:OBJECT`: a function of your own, called as f(split, resolution, **options). It answers
    Images, or uint8 (N,C,H,W) as a tensor or an array, at `resolution` or 2^k times as large.

    `root`: folder of the published files; by default $MRCNF_DATA, otherwise ./data.
    `resolution` (pixels): images 2^k times as large are averaged over 2^k×2^k pixels, rounding
    halves up once (`mrcnf.data.reduce`); 28×28 images get borders of zeros to 32×32 first where
    `resolution` divides 32. Files of a folder are cropped to their central square and averaged by
    the same rule, whatever their size. `photos` are cut at `resolution` (default 32, at most 128).
    `limit`: only the first that many images (those of `photos` alternate between photographs).
    `download`: fetch what is missing into `root` and check its published MD5 (needs the extra
    `data`).

    Raises UserError for unknown names and splits, missing or damaged files, arrays of another
    shape or type, sizes that do not lead to `resolution`, and splits without images.
    """
    if split not in SPLITS:
        raise UserError(f"data split '{split}' is unknown; choose one of {', '.join(SPLITS)}")
    if (resolution is not None and resolution < 1) or (limit is not None and limit < 1):
        raise UserError(f"resolution {resolution}, limit {limit}: must be at least 1")
    kind, _, place = name.partition(":")
    path, groups = Path(place).expanduser(), None
    if name == "photos":
        pixels, groups = _photos(split, resolution or 32)
        pixels = pixels[:limit]
    elif name in published.PUBLISHED:
        base = Path(root or os.environ.get("MRCNF_DATA") or "data").expanduser()
        pixels = published.read(name, split, base, resolution, limit, download)
    elif kind == "folder" and place:
        pixels = _folder(path, split, resolution, limit)
    elif kind == "npz" and place:
        pixels, groups = _npz_split(path, split)
        pixels = halve(pixels[:limit], resolution, path)
    elif plugins.is_own(name):
        pixels, groups = _own(name, split, resolution, options or {})
        pixels = halve(pixels[:limit], resolution, Path(name))
    else:
        raise UserError(f"data name '{name}' is unknown; choose one of {', '.join(NAMES)}")
    if not pixels.size:
        raise UserError(f"{name}: split '{split}' has no images; add some or choose another split")
    tensor = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
    numbers = None if groups is None else torch.from_numpy(groups[:limit].astype(np.int64))
    return Images(tensor, name, split, numbers)


def _belongs(keys: list[str], split: str, where: Path) -> np.ndarray:
    """Which keys are in `split`, bool (N,): the same nine of ten on every machine, for ever."""
    if split == "val":
        raise UserError(f"{where}: is divided into train and test only; choose one or supply val")
    # The salt keeps this independent of splits that others made by hashing the same names.
    digests = (hashlib.sha256(b"mrcnf " + os.fsencode(key)).digest() for key in keys)
    return np.array([(int.from_bytes(d) % 10 == 0) == (split == "test") for d in digests], bool)


def _photos(split: str, resolution: int) -> tuple[np.ndarray, np.ndarray]:
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
    return pixels, np.tile(np.arange(len(photographs)), len(corners))


def _folder(path: Path, split: str, resolution: int | None, limit: int | None) -> np.ndarray:
    divided = any((path / s).is_dir() for s in SPLITS)
    top = path / split if divided else path
    if not top.is_dir():
        raise UserError(f"{top}: there is no such folder; check the path or make it")
    files = {p.relative_to(top).as_posix(): p for p in top.rglob("*") if p.is_file()}
    names = sorted(n for n in files if n.lower().endswith(SUFFIXES) and "/." not in f"/{n}")
    if not names:
        raise UserError(f"{top}: holds no image files (names ending in {' '.join(SUFFIXES)})")
    if not divided:
        names = [n for n, yes in zip(names, _belongs(names, split, path), strict=True) if yes]
    images: list[np.ndarray] = []
    for name in names[:limit]:
        image = read_image(files[name]).numpy()
        images.append(central(image, resolution, files[name]) if resolution else image)
        if images[-1].shape[1:] != images[0].shape[1:]:
            pair = ((names[0], images[0]), (name, images[-1]))
            sizes = " but ".join(f"{n} is {i.shape[2]}×{i.shape[1]}" for n, i in pair)
            raise UserError(f"{top}: {sizes}; give a resolution to make them alike")
    depth = max((len(i) for i in images), default=1)
    return np.array([np.broadcast_to(i, (depth, *i.shape[1:])) for i in images], np.uint8)


def _own(
    name: str, split: str, resolution: int | None, options: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The pixels, and groups if there are any, that a user's own function answers."""
    found = plugins.call(name, "data.name", split, resolution, **options)
    groups: torch.Tensor | None = None
    if isinstance(found, Images):
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
    return pixels, None if groups is None else groups.cpu().numpy()


def _npz_split(path: Path, split: str) -> tuple[np.ndarray, np.ndarray | None]:
    divided = path.is_dir()
    pixels, photo = read_npz(path / f"{split}.npz" if divided else path)
    source = np.arange(len(pixels)) if photo is None else photo
    keys, groups = np.unique(source, return_inverse=True)
    if not divided:
        chosen = _belongs([str(key) for key in keys], split, path)[groups]
        pixels, groups = pixels[chosen], groups[chosen]
    return pixels, None if photo is None else groups
