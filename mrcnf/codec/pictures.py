"""Image files on their way into a compressed file, and out of it again."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mrcnf import files
from mrcnf.codec.contents import check_name, folded
from mrcnf.codec.fields import Malformed
from mrcnf.data.formats import read_npz
from mrcnf.data.imagefile import encode_png, read_image
from mrcnf.errors import UserError

PNG = ".png"


def gather(paths: Sequence[Path], channels: int, out: Path) -> tuple[list[str], list[Tensor]]:
    """Names and pixels, uint8 (C, H, W), of image files and npz archives in their order.

    An image is called as its file without the ending, an archive's images as the archive with their
    numbers.

    Args:
        channels: of the model. One for colour takes grey images as they are, one for grey
            takes images in colour whose channels are equal.
        out: the file that is to be written.

    Raises:
        UserError: there are none, names clash or cannot be kept (all this before a pixel is
            read), or a file cannot be read.
    """
    if not paths:
        raise UserError("no image to compress; name at least one image file or npz archive")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file in it")
    if same := [path for path in paths if os.path.realpath(path) == os.path.realpath(out)]:
        raise UserError(f"{same[0]} would be written over; choose another --out")
    refuse_clashes([path.stem for path in paths], list(map(str, paths)))
    names, origins, images = list[str](), list[str](), list[Tensor]()
    for path in paths:
        if path.suffix.lower() == ".npz":
            found = _archive(path, channels)
            digits = len(str(len(found) - 1))
            names += [f"{path.stem}-{i:0{digits}}" for i in range(len(found))]
        else:
            found = [read_image(path, channels=1 if channels == 1 else None)]
            names.append(path.stem)
        origins += [str(path)] * len(found)
        images += found
    refuse_clashes(names, origins)
    return names, images


def _archive(path: Path, channels: int) -> list[Tensor]:
    pixels = torch.from_numpy(np.require(read_npz(path)[0], requirements=["C", "W"]))
    if not pixels.numel():
        raise UserError(f"{path}: holds no images; leave it out")
    if channels == 1 and pixels.shape[1] == 3:
        if bool((pixels != pixels[:, :1]).any()):
            raise UserError(f"{path}: has 3 channels where 1 is needed; convert it to grey first")
        pixels = pixels[:, :1]
    return list(pixels.contiguous())


def refuse_clashes(names: Sequence[str], origins: Sequence[str]) -> None:
    """A UserError for two images that would be one file, or none, when they come out again.

    Args:
        names: of the images, with or without the ending .png.
        origins: what to call them in the message.
    """
    seen: dict[str, str] = {}
    for name, origin in zip(names, origins, strict=True):
        try:
            check_name(name)
        except Malformed as error:
            raise UserError(f"{origin}: {error}; rename it") from None
        key = folded(png_name(name))
        if key in seen:
            raise UserError(
                f"{seen[key]} and {origin} would both come out as {png_name(name)}; rename one of "
                "them, or compress them into different files"
            )
        seen[key] = origin


def png_name(name: str) -> str:
    """The name of the PNG file of an image."""
    return name if folded(name).endswith(PNG) else name + PNG


def names_out(names: Sequence[str]) -> list[str]:
    """The names that images have outside of their file: numbers for those without any.

    Raises:
        UserError: two would be one file.
    """
    if any(names):
        refuse_clashes(names, names)
        return list(names)
    digits = len(str(max(0, len(names) - 1)))
    return [f"{i:0{digits}}" for i in range(len(names))]


def check_folder(out: Path) -> None:
    """A UserError for what cannot be, or become, a folder to write images into."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{out}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"{out}: cannot be written to; choose another place")


def write_pngs(out: Path, names: Sequence[str], images: Sequence[Tensor]) -> None:
    """A PNG file for each uint8 (C, H, W) in a folder, all or none."""
    pairs = zip(names, images, strict=True)
    files.write_all(out, ((png_name(name), encode_png(image)) for name, image in pairs))


def check_alike(shapes: Sequence[tuple[int, ...]]) -> None:
    """A UserError unless images of these shapes fit into one array."""
    if len(kinds := Counter(shapes)) > 1:
        (c, h, w), (other, tall, wide) = list(kinds)[:2]
        raise UserError(
            f"images of {w}×{h}×{c} and of {wide}×{tall}×{other} do not fit into one array; "
            "leave out --npz"
        )


def write_npz(path: Path, names: Sequence[str], images: Sequence[Tensor]) -> None:
    """An archive of `images`, uint8 (N, H, W, C), and `names`, which `data.load` reads as well."""
    buffer = io.BytesIO()
    pixels = torch.stack(list(images)).permute(0, 2, 3, 1).numpy()
    np.savez_compressed(buffer, images=pixels, names=np.array(names, dtype=str))
    files.write(path, buffer.getvalue())
