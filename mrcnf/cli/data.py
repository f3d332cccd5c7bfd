"""The commands that begin with data: new, pack."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import tyro
from tqdm import tqdm

from mrcnf import files, runtime
from mrcnf.cli.common import Overrides
from mrcnf.data import datasets, folders, packing
from mrcnf.errors import UserError
from mrcnf.runs import config as configuration
from mrcnf.runs.settings import DataConfig
from mrcnf.training.draft import draft


def new(
    name: tyro.conf.Positional[str],
    data: str,
    resolutions: tuple[int, ...] = (),
    minutes: float = 20.0,
    crop: int = 0,
    overrides: Overrides = (),
) -> None:
    """Write NAME.toml, a configuration with comments that fits some images and this machine.

    Steps are chosen to take the minutes; each level is trained for a few steps to measure its pace.

    Args:
        name: of the run; the file is NAME.toml, here.
        data: name of the images, e.g. folder:photos, whose photographs are cut into crops.
        resolutions: sides of the levels' images in pixels, coarsest first; by default chosen.
        minutes: what training all levels is to take, about.
        crop: squares that each photograph of a folder is cut into, at most; 0: chosen.
        overrides: settings of data, e.g. data.root=DIR.
    """
    out = Path(f"{name.removesuffix('.toml')}.toml")
    if not re.fullmatch(r"\w[\w.-]*", out.stem):
        raise UserError(f"name {out.stem!r}: use letters, digits, and - . _ between them")
    if out.exists():
        raise UserError(f"{out} is there already; remove it or choose another name")
    settings = _data(data, overrides, crop=crop)
    if settings.name == "photos" and Path("photos").is_dir():
        note = "photos are the embedded photographs; for those in the folder say folder:photos"
        print(f"mrcnf: note: {note}", file=sys.stderr)
    found = draft(out.stem, settings, resolutions, minutes)
    files.write(out, found.text)
    device = runtime.choose_device(found.config.train.device)
    paces = "; ".join(
        f"level {r}: {found.config.at_level(r).train.steps:,} steps of {s:.3f} s"
        for r, s in found.seconds.items()
    )
    run = f"runs/{out.stem}"
    print(
        f"{out}: {found.images}.",
        f"Training will take about {found.minutes:.2g} minutes here, on {device.type}, by the time "
        f"that a few steps of each level took just now ({paces}).",
        f"Start:  mrcnf train {out}",
        f"Then:   mrcnf report {run}",
        f"        mrcnf sample {run} --out samples.png",
        f"        mrcnf upscale {run} PHOTO.png --out upscaled",
        sep="\n",
    )


def pack(
    data: tyro.conf.Positional[str],
    out: Path,
    split: str = "train",
    resolution: int = 0,
    crop: int = 0,
    limit: int = 0,
    overrides: Overrides = (),
) -> None:
    """Write images into one file that training reads from as it goes, whatever does not fit memory.

    Call it for FOLDER/train.npy and, with --split test, for FOLDER/test.npy; then data.name is
    npy:FOLDER. A call that was interrupted goes on when it is repeated.

    Args:
        data: name of the images, as data.name.
        out: file to write, ending in .npy; FILE.info.json and, of photographs, FILE.groups.npy
            come beside it.
        split: train, test or val.
        resolution: of the images in pixels, the model's finest; 0 keeps theirs.
        crop: cut each photograph of a folder into at most so many squares, as data.crop.
        limit: the first so many images; 0: all.
        overrides: settings of data, e.g. data.root=DIR, data.download=true.
    """
    settings = _data(data, overrides, crop=crop, limit=limit)
    if out.stem in folders.SPLITS and out.stem != split:
        raise UserError(
            f"{out}: in npy:{out.parent} this would be the split {out.stem}, but it is {split}; "
            f"add --split {out.stem}, or choose another --out"
        )
    stream = datasets.open_stream(
        data, split, root=settings.root, resolution=resolution or None,
        limit=settings.limit or None, download=settings.download, crop=settings.crop,
        options=settings.options,
    )  # fmt: skip
    size = math.prod(stream.shape[1:])
    with tqdm(total=len(stream) * size, desc=out.name, unit="B", unit_scale=True,
              disable=not sys.stderr.isatty()) as bar:  # fmt: skip
        found = packing.pack(
            stream, out, name=data, split=split, resolution=resolution or None, crop=settings.crop,
            options=settings.options, report=lambda done: bar.update(done * size - bar.n),
        )  # fmt: skip
    count, channels, height, width = stream.shape
    sources = "" if stream.groups is None else f" of {len(set(stream.groups.tolist()))} photographs"
    print(
        f"{out}: {count} images of {channels}×{height}×{width}{sources} from {data}, {split}; "
        f"{found.size / 1e6:.1f} MB, sha256 {found.sha256[:12]}…"
    )


def _data(name: str, overrides: tuple[str, ...], **given: int) -> DataConfig:
    """Settings of data: those given, where they are not 0, go before those in the overrides."""
    table = configuration.override({}, overrides)
    if others := table.keys() - {"data"}:
        raise UserError(f"{min(others)} is not asked for here, which takes settings of data")
    own = {key: value for key, value in given.items() if value}
    return configuration.changed(DataConfig(), table.get("data", {}) | own | {"name": name}, "data")
