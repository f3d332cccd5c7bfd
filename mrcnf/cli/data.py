"""The commands about data: pack."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import tyro
from tqdm import tqdm

from mrcnf.cli.common import Overrides
from mrcnf.data import datasets, packing
from mrcnf.errors import UserError
from mrcnf.runs import config as configuration
from mrcnf.runs.settings import DataConfig


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
    table = configuration.override({}, overrides)
    if others := table.keys() - {"data"}:
        raise UserError(f"{min(others)} has no part in packing; it takes settings of data")
    given = {"name": data} | {k: v for k, v in (("crop", crop), ("limit", limit)) if v}
    settings = configuration.changed(DataConfig(), table.get("data", {}) | given, "data")
    stream = datasets.open_stream(
        data, split, root=settings.root, resolution=resolution or None,
        limit=settings.limit or None, download=settings.download, crop=settings.crop,
    )  # fmt: skip
    size = math.prod(stream.shape[1:])
    with tqdm(total=len(stream) * size, desc=out.name, unit="B", unit_scale=True,
              disable=not sys.stderr.isatty()) as bar:  # fmt: skip
        found = packing.pack(
            stream, out, name=data, split=split, resolution=resolution or None, crop=settings.crop,
            report=lambda done: bar.update(done * size - bar.n),
        )  # fmt: skip
    count, channels, height, width = stream.shape
    sources = "" if stream.groups is None else f" of {len(set(stream.groups.tolist()))} photographs"
    print(
        f"{out}: {count} images of {channels}×{height}×{width}{sources} from {data}, {split}; "
        f"{found.size / 1e6:.1f} MB, sha256 {found.sha256[:12]}…"
    )
