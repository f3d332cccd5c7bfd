"""The commands of the lossless codec: compress, decompress."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path

import tyro

from mrcnf import codec, files, runtime
from mrcnf.cli.common import Paths, Run, note_unfinished
from mrcnf.codec import container, pictures
from mrcnf.runs import checkpoint


def compress(
    run: Run,
    images: Paths,
    out: Path,
    steps: int | None = None,
    portable: bool = False,
    streams: int | None = None,
    workers: int | None = None,
    json: Path | None = None,
    trust: bool = False,
) -> None:
    """Write images into one small file, from which they come back bit for bit.

    Args:
        run: a trained run.
        images: PNG, WebP, JPEG, BMP or GIF files (their pixels are what is kept), npz archives.
        out: file to write, NAME.mrc.
        steps: short steps per level: more take longer and give smaller files; by default what
            was found to be best for the model.
        portable: write a file that decodes on every machine and with every version of PyTorch;
            it takes several times as long, to write and to read.
        streams: at most so many, of successive whole images, that can be coded at the same time;
            each has to begin. By default one for about every half megapixel.
        workers: processes, of which no more than there are streams are used; by default one for
            each CPU core.
        json: file to write the numbers to.
        trust: run the code that the run names of its own, if it does: read it first.
    """
    model = checkpoint.load(run, trust=trust)
    names, pixels = pictures.gather(images, model.config.channels, out)
    note_unfinished(run)
    result = codec.encode(
        model, pixels, names=names, steps=steps, portable=portable, streams=streams,
        workers=runtime.cores() if workers is None else workers, progress=sys.stderr.isatty(),
    )  # fmt: skip
    files.write(out, result.data)
    print(f"{out}: {result}")
    if json is not None:
        files.write(json, dumps(result.table(), indent=2) + "\n")


def decompress(
    file: tyro.conf.Positional[Path],
    run: Path,
    out: Path,
    resolution: int | None = None,
    npz: bool = False,
    workers: int | None = None,
    trust: bool = False,
) -> None:
    """Get the images of a compressed file back, as PNG files.

    Args:
        file: what `mrcnf compress` wrote.
        run: the trained run that it was written with.
        out: folder to write to.
        resolution: of a level: read the file only so far, for the images averaged to that size
            (of integer pyramids).
        npz: write one archive, FILE.npz, of images of one size instead.
        workers: processes, of which no more than the file has streams are used; by default one
            for each CPU core.
        trust: run the code that the run names of its own, if it does: read it first.
    """
    pictures.check_folder(out)
    data = container.read(file, resolution=resolution)
    model = checkpoint.load(run, trust=trust)
    with container.named(file):
        entries = container.unpack(data, resolution=resolution).entries
        names = pictures.names_out([entry.name for entry in entries])
        if npz:
            pictures.check_alike([(e.channels, e.height, e.width) for e in entries])
        images = codec.decompress(
            model, data, resolution=resolution,
            workers=runtime.cores() if workers is None else workers,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
    if npz:
        out = out / f"{file.stem}.npz"
        pictures.write_npz(out, names, images)
    else:
        pictures.write_pngs(out, names, images)
    print(f"{out}: {len(images):,} images")
