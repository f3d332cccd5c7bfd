"""Single image files: what is read, and that whatever cannot be read faithfully is refused."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mrcnf import files
from mrcnf.data import imagefile as images
from mrcnf.data.imagefile import read_image, save_image
from mrcnf.errors import UserError

COLOUR = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
GREY = COLOUR[..., 0]


def encoded(kind, image=None, **options):
    stream = io.BytesIO()
    (image or Image.fromarray(COLOUR)).save(stream, kind, **options)
    return stream.getvalue()


def png(width, height, depth, colour, rows, *extra):
    """A PNG with any header, well-formed or not."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content)
        )

    head = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", head), *(chunk(*e) for e in extra)]
    chunks += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def refused(path, *words, **options):
    with pytest.raises(UserError) as error:
        read_image(path, **options)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert ";" in message  # what; what to do
    assert message.count(str(path)) == 1 or "cannot identify" in message  # not one within another


@pytest.fixture
def write(tmp_path):
    def write(content, name="image.png"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_give_the_pixels(write, kind):
    path = write(encoded(kind, **({"lossless": True} if kind == "WEBP" else {})))
    got = read_image(path)
    assert got.dtype == torch.uint8 and got.is_contiguous()
    assert np.array_equal(got.numpy(), COLOUR.transpose(2, 0, 1))


def test_grey_colour_and_channels(write):
    grey, colour = write(encoded("PNG", Image.fromarray(GREY)), "g.png"), write(encoded("PNG"))
    assert np.array_equal(read_image(grey), GREY[None])
    assert np.array_equal(read_image(grey, channels=3), np.stack([GREY] * 3))
    assert read_image(colour, channels=3).shape == (3, 12, 9)
    refused(colour, "3 channels where 1 are needed", channels=1)
    same = write(encoded("PNG", Image.fromarray(np.dstack([GREY] * 3))), "same.png")
    assert np.array_equal(read_image(same, channels=1), GREY[None])


def test_other_depths_and_palettes(write):
    two = Image.fromarray(GREY).convert("1")
    got = read_image(write(encoded("PNG", two)))
    assert np.array_equal(got, np.array(two, np.uint8)[None] * 255)
    palette = Image.fromarray(COLOUR).quantize(8)
    expected = np.array(palette.convert("RGB")).transpose(2, 0, 1)
    for kind in ("PNG", "GIF", "BMP"):
        assert np.array_equal(read_image(write(encoded(kind, palette))), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_only_where_opaque(write, mode):
    image = Image.fromarray(COLOUR).convert(mode)
    expected = np.atleast_3d(np.array(image)[..., :-1]).transpose(2, 0, 1)
    assert np.array_equal(read_image(write(encoded("PNG", image))), expected)
    alpha = Image.new("L", image.size, 255)
    alpha.putpixel((3, 4), 254)
    image.putalpha(alpha)
    refused(write(encoded("PNG", image)), "partly transparent", "flatten")


def test_a_transparent_colour_counts_where_it_occurs(write):
    rows = b"\0\x10\x20" * 2
    assert read_image(write(png(2, 2, 8, 0, rows, (b"tRNS", b"\0\x30")))).shape == (1, 2, 2)
    refused(write(png(2, 2, 8, 0, rows, (b"tRNS", b"\0\x20"))), "partly transparent")
    palette = (b"PLTE", b"\1\2\3\4\5\6")
    rows = b"\0\0\1" * 2
    assert read_image(write(png(2, 2, 8, 3, rows, palette, (b"tRNS", b"\xff")))).shape == (3, 2, 2)
    refused(write(png(2, 2, 8, 3, rows, palette, (b"tRNS", b"\x7f"))), "partly transparent")


@pytest.mark.parametrize(("colour", "samples"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_refused(write, colour, samples):
    rows = (b"\0" + bytes(range(2 * samples)) * 3) * 3
    refused(write(png(3, 3, 16, colour, rows)), "16 bits", "convert it to 8 bits")


@pytest.mark.parametrize("mode", ["CMYK"])
def test_other_colour_spaces_are_refused(write, mode):
    image = Image.fromarray(COLOUR).convert(mode)
    refused(write(encoded("JPEG", image), "a.jpg"), "colour mode CMYK", "convert it")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_several_frames_are_refused(write, kind):
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    content = encoded(kind, frames[0], save_all=True, append_images=frames[1:])
    refused(write(content, f"a.{kind.lower()}"), "several frames", "PNG")


def test_a_phone_photograph_with_a_preview_is_its_first_picture(write):
    image = Image.fromarray(COLOUR)
    content = encoded("MPO", image, save_all=True, append_images=[image.resize((4, 4))], quality=95)
    assert read_image(write(content, "a.jpg")).shape == (3, 12, 9)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(write, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: GREY, 2: GREY[:, ::-1], 3: GREY[::-1, ::-1], 4: GREY[::-1], 5: GREY.T,
        6: GREY[::-1].T, 7: GREY[::-1, ::-1].T, 8: GREY[:, ::-1].T,
    }[orientation]
    got = read_image(write(encoded("PNG", Image.fromarray(GREY), exif=exif)))
    assert np.array_equal(got[0], upright)


def test_the_smallest_image_and_unusual_names(write):
    one = Image.fromarray(COLOUR[:1, :1])
    for name in ("ä ö — 図.png", "no suffix", "a\nb.png", "%s{x}.png"):
        assert read_image(write(encoded("PNG", one), name)).shape == (3, 1, 1)


@pytest.mark.parametrize("side", [9000, 2**15, 2**31 - 1])
def test_huge_dimensions_are_refused_before_decoding(write, side):
    # Pillow itself warns of the first, raises for the second and knows no such PNG as the third.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = "64 megapixels" if side == 9000 else "replace it"
        refused(write(png(side, side, 8, 2, b"\0" * 100)), words)


def test_the_limit_is_ours(write, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 12 * 9)
    path = write(encoded("PNG"))
    assert read_image(path).shape == (3, 12, 9)
    monkeypatch.setattr(images, "MAX_PIXELS", 12 * 9 - 1)
    refused(path, "9×12 is more than", "shrink")


def test_what_is_not_an_image_file(write, tmp_path, monkeypatch):
    refused(write(b""), "is empty")
    refused(write(b"Dear reader,\n"), "cannot be read as a PNG, JPEG, BMP, WebP or GIF image")
    refused(write(encoded("TIFF"), "a.tif"), "cannot be read")
    refused(write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.eps"), "cannot be read")
    refused(tmp_path, "is a folder")
    refused(tmp_path / "missing.png", "no such file")
    refused(tmp_path / ("long" * 100), "cannot be read")
    path = write(encoded("PNG"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop"):
        read_image(tmp_path / "loop")

    def deny(*args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", deny)
    refused(path, "Permission denied")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "no such file")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "GIF"])
def test_every_substantial_truncation_is_an_error(write, kind):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8))
    good = encoded(kind, image)
    assert read_image(write(good)).shape == (3, 40, 40)
    for tenths in range(1, 10):
        refused(write(good[: len(good) * tenths // 10]), "cannot be read")
    if kind == "PNG":
        for cut in range(5, 40):  # without its last chunk a PNG is not whole
            refused(write(good[:-cut]), "cannot be read")


def test_any_flipped_byte_of_a_png_is_noticed(write):
    good = encoded("PNG", Image.fromarray(GREY[:3, :3]))
    for place in range(len(good) - 12):  # the last chunk is empty: it says nothing of the image
        bad = bytearray(good)
        bad[place] ^= 0x10
        with pytest.raises(UserError, match=r"image\.png"):
            read_image(write(bad))


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
VALID = {
    "PNG": encoded("PNG"),
    "PNG palette": encoded("PNG", Image.fromarray(COLOUR).quantize(8)),
    "JPEG": encoded("JPEG"),
    "JPEG exif": encoded("JPEG", exif=TURNED),
    "JPEG progressive": encoded("JPEG", progressive=True),
    "BMP": encoded("BMP"),
    "BMP palette": encoded("BMP", Image.fromarray(COLOUR).quantize(8)),
    "WEBP": encoded("WEBP"),
    "WEBP lossless": encoded("WEBP", lossless=True),
    "GIF": encoded("GIF", Image.fromarray(GREY)),
}


@pytest.mark.parametrize("kind", VALID)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choices=st.data())
def test_damage_gives_an_image_or_a_user_error(kind, choices, tmp_path):
    good = VALID[kind]
    place = st.integers(0, len(good) - 1) | st.integers(0, min(len(good), 80) - 1)
    flips = choices.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=4))
    bad = bytearray(good)
    for at, value in flips:
        bad[at] = value
    end = choices.draw(st.just(len(bad)) | st.integers(0, len(bad)))
    path = tmp_path / "spoilt"
    path.write_bytes(bad[:end])
    try:
        got = read_image(path, channels=choices.draw(st.sampled_from([None, 1, 3])))
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        assert got.dtype == torch.uint8 and got.ndim == 3 and len(got) in (1, 3)
        assert got.shape[1] * got.shape[2] <= images.MAX_PIXELS


# Writing


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_saved_is_read_again(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    path = tmp_path / "new" / "folder" / "图.png"
    for _ in range(2):  # the second time over the first
        save_image(path, image)
        assert torch.equal(read_image(path), image)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path, old = tmp_path / "a.png", torch.zeros(1, 4, 4, dtype=torch.uint8)
    save_image(path, old)

    def fill_the_disk(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fill_the_disk)
    with pytest.raises(UserError, match=r"a\.png: cannot be written \(No space left"):
        save_image(path, old + 1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert torch.equal(read_image(path), old)


def test_saving_refuses_other_formats_shapes_and_places(tmp_path):
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(UserError, match="end the name in"):
        save_image(tmp_path / "a.jpg", image)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="choose another place"):
        save_image(tmp_path / "file" / "a.png", image)
    for bad in (image.float(), image[None], image[:2]):
        with pytest.raises(ValueError, match="expected uint8"):
            save_image(tmp_path / "a.png", bad)


@pytest.mark.parametrize("image", [COLOUR, GREY[..., None]], ids=["colour", "grey"])
def test_png_bytes_give_the_pixels_back(image):
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    data = images.encode_png(pixels)
    again = images.decode_png(data, tuple(pixels.shape))
    assert torch.equal(again, pixels) and again.is_contiguous()
    spoilt = bytearray(data)
    spoilt[len(data) // 2] ^= 1
    channels, height, width = pixels.shape
    for bytes_, shape in (
        (data, (channels, height, width + 1)), (data, (4 - channels, height, width)),
        (data[:-20], pixels.shape), (bytes(spoilt), pixels.shape), (b"", pixels.shape),
        (png(2**20, 2**20, 8, 0, b""), pixels.shape), (encoded("BMP"), pixels.shape),
    ):  # fmt: skip
        with pytest.raises(UserError, match="inside is damaged") as error:
            images.decode_png(bytes_, shape)
        assert "\n" not in str(error.value)
