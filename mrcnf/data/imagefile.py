"""Single image files, in and out."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from mrcnf import files
from mrcnf.errors import UserError

GREY = ("1", "L", "LA")  # Pillow's modes that become one channel
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")
MAX_PIXELS = 64 * 2**20  # of one image file: a few damaged bytes could ask for gigabytes


def read_image(path: str | Path, *, channels: int | None = None) -> torch.Tensor:
    """Reads a PNG, JPEG, BMP, WebP or GIF file: uint8 (C, H, W), C = 1 (grey) or 3 (RGB).

    The EXIF orientation is applied, palettes become RGB, an alpha channel that is opaque
    everywhere is dropped. `channels=3` repeats grey; `channels=1` accepts colour if R = G = B.

    Raises UserError, naming the file and the remedy, for whatever would lose information or be a
    guess (16 bits per sample, transparency, CMYK, several frames), for more than 64 megapixels,
    and for files that are missing, truncated, damaged or not images.
    """
    path = Path(path)
    with reading(path, "a PNG, JPEG, BMP, WebP or GIF image"), warnings.catch_warnings():
        # Pillow warns of odd metadata, which do not matter, and of sizes, which are refused below.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path}: {image.width}×{image.height} is more than "
                                f"{MAX_PIXELS >> 20} megapixels; shrink or cut it first")
            image.verify()  # PNG checksums, which decoding ignores; it uses the open file up
        with Image.open(path, formats=FORMATS) as image:
            # A phone's MPO holds previews after the photograph, which comes first.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise UserError(f"{path}: holds several frames; save the one you mean as PNG")
            # Pillow cuts 16-bit RGB to 8 bits in silence: only the decoder's arguments tell.
            if any(";16B" in str(tile[3]) for tile in image.tile):
                raise UserError(f"{path}: has 16 bits per sample; convert it to 8 bits first")
            image.load()
            array = np.array(_plain(ImageOps.exif_transpose(image), path))
    pixels = torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()
    if channels == 3 and len(pixels) == 1:
        return pixels.repeat(3, 1, 1)
    if channels == 1 and len(pixels) == 3 and bool((pixels == pixels[:1]).all()):
        return pixels[:1].clone()
    if channels not in (None, len(pixels)):
        raise UserError(f"{path}: has {len(pixels)} channels where {channels} are needed; "
                        f"convert it to {'grey' if channels == 1 else 'RGB'} first")
    return pixels


def image_shape(path: Path) -> tuple[int, int, int]:
    """What `read_image` will give, (C, H, W), from the beginning of the file.

    Raises UserError for files that are missing or not images.
    """
    with reading(path, "a PNG, JPEG, BMP, WebP or GIF image"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            width, height = image.size[::-1] if turned else image.size
            return (1 if image.mode in GREY else 3), height, width


def _plain(image: Image.Image, path: Path) -> Image.Image:
    """The image in mode L or RGB, if nothing is lost thereby."""
    clear = image.has_transparency_data
    if clear and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise UserError(f"{path}: is partly transparent; flatten it onto a background first")
    if image.mode in GREY:
        return image.convert("L")
    if image.mode in ("P", "PA", "RGB", "RGBA"):
        return image.convert("RGB")
    raise UserError(f"{path}: has colour mode {image.mode}; convert it to 8-bit RGB or grey first")


def check_png(path: Path) -> None:
    """A UserError unless a name ends in .png, as those of all pictures that are written do."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: images are written as PNG; end the name in .png")


def save_image(path: str | Path, image: torch.Tensor) -> None:
    """Writes uint8 (C, H, W), C = 1 or 3, as PNG: whole or not at all.

    Missing folders are made. Raises UserError if the name does not end in .png (what other formats
    lose, nobody should lose by a suffix) or the file cannot be written; ValueError for another
    shape or type.
    """
    path = Path(path)
    check_png(path)
    files.write(path, encode_png(image))


def encode_png(image: torch.Tensor) -> bytes:
    """The bytes of a PNG file of uint8 (C, H, W), C = 1 or 3; ValueError for anything else."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected uint8 (1 or 3, H, W), not {image.dtype} {tuple(image.shape)}")
    array = np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if image.shape[0] == 1 else array).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes, shape: tuple[int, int, int]) -> torch.Tensor:
    """What `encode_png` was given, uint8 of `shape` (C, H, W).

    Raises UserError for other bytes, for a PNG of another shape before any memory is taken for it.
    """
    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.size != (width, height) or image.mode != {1: "L", 3: "RGB"}[channels]:
                raise ValueError(f"{image.mode} {image.width}×{image.height}")
            image.verify()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            array = np.array(image).reshape(height, width, channels)
    except Exception as error:  # a decoder raises anything on bytes that are none
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"a PNG of {width}×{height} inside is damaged ({reason}); get an intact "
                        "copy") from None
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a parser raises on damaged bytes, which is anything, into a UserError."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file in it")
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; check the name")
        if not path.stat().st_size:
            raise UserError(f"{path}: is empty; replace it with an intact copy")
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read as {what} ({reason}); "
                        "replace it with an intact copy") from error
