"""The commands of the codec: images in, one file, the same images out; nothing half done."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from terminal import mrcnf_says, refused
from tiny import files, smooth_images, trained

import mrcnf
from mrcnf import cli, codec
from mrcnf.codec import container
from mrcnf.data.formats import read_npz
from mrcnf.data.imagefile import read_image, save_image
from mrcnf.image import haar

constriction = pytest.importorskip("constriction", reason="the extra compress is not installed")


@pytest.fixture(scope="module")
def pictures(made, tmp_path_factory):
    """Image files of several formats and sizes, in an order that is not the alphabet's."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = smooth_images(5, side=4)
    save_image(folder / "zebra.png", pixels[0])
    save_image(folder / "Été 2.png", smooth_images(1, side=6)[0])
    array = pixels[1, 0].numpy()
    Image.fromarray(array).save(folder / "apple.webp", lossless=True)
    Image.fromarray(smooth_images(1, side=8)[0, 0].numpy()).save(folder / "b.old.JPG", "JPEG")
    np.savez(folder / "many.npz", images=pixels[2:].permute(0, 2, 3, 1).numpy())
    return folder


ORDER = ("zebra.png", "Été 2.png", "many.npz", "apple.webp", "b.old.JPG")
OUT = ("zebra.png", "Été 2.png", "many-0.png", "many-1.png", "many-2.png", "apple.png", "b.old.png")


@pytest.fixture(scope="module")
def coded(made, pictures):
    """One file of all of them."""
    path = made.folder / "all.mrc"
    given = [str(pictures / name) for name in ORDER]
    cli.main(["compress", str(made.run), *given, "--out", str(path), "--steps", "2"])
    return path


def test_what_comes_out_is_what_went_in(made, pictures, coded, tmp_path, capsys):
    said = mrcnf_says(capsys, "decompress", coded, "--run", made.run, "--out", tmp_path / "back")
    assert said == f"{tmp_path / 'back'}: 7 images\n"
    assert {path.name for path in (tmp_path / "back").iterdir()} == set(OUT)
    many = torch.from_numpy(read_npz(pictures / "many.npz")[0].copy())
    for name in OUT:
        back = read_image(tmp_path / "back" / name)
        if name.startswith("many"):
            original = many[int(name[5])]
        else:
            (path,) = (p for p in pictures.iterdir() if p.stem == name.removesuffix(".png"))
            original = read_image(path, channels=1)
        assert torch.equal(back, original)


def test_names_and_order_are_kept(coded):
    names = [entry.name for entry in container.unpack(coded.read_bytes()).entries]
    assert [f"{name}.png" for name in names] == list(OUT)


def test_one_array_comes_out_of_images_of_one_size(made, pictures, tmp_path, capsys):
    path, back = tmp_path / "n.mrc", tmp_path / "back"
    given = [pictures / "many.npz", pictures / "zebra.png"]
    mrcnf_says(
        capsys, "compress", made.run, *given, "--out", path, "--steps", 2, "--portable"
    )
    assert container.unpack(path.read_bytes()).settings["portable"]
    said = mrcnf_says(capsys, "decompress", path, "--run", made.run, "--out", back, "--npz")
    assert said == f"{back / 'n.npz'}: 4 images\n"
    pixels, _ = read_npz(back / "n.npz")
    assert np.array_equal(pixels[:3], read_npz(given[0])[0])
    assert np.array_equal(pixels[3], read_image(given[1]).numpy())
    assert np.load(back / "n.npz")["names"].tolist() == ["many-0", "many-1", "many-2", "zebra"]


def test_the_numbers_are_written_and_said(made, tmp_path, capsys):
    out, numbers = tmp_path / "a.mrc", tmp_path / "a.json"
    said = mrcnf_says(
        capsys, "compress", made.run, made.folder / "8.png", "--out", out, "--steps", 3, "--json",
        numbers,
    )  # fmt: skip
    table = json.loads(numbers.read_text())
    assert table["bits_per_dim"] == pytest.approx(8 * out.stat().st_size / 64)
    assert table["bound"] > 0 and table["seconds"] >= 0
    excess = 100 * (table["bits_per_dim"] / table["bound"] - 1)
    assert table["overhead_percent"] == pytest.approx(excess, abs=0.01)
    assert said.startswith(f"{out}: ") and f"{table['bits_per_dim']:.4f} bits/dim" in said


def test_a_file_is_described(coded, capsys):
    said = mrcnf_says(capsys, "info", coded)
    assert "7 images in " in said and "5 of 4×4, grey" in said and "whole" not in said


def test_images_without_names_are_numbered(made, tmp_path, capsys):
    path = tmp_path / "a.mrc"
    images = smooth_images(11, side=4)
    path.write_bytes(codec.compress(mrcnf.load(made.run), images, steps=2))
    mrcnf_says(capsys, "decompress", path, "--run", made.run, "--out", tmp_path / "back")
    assert torch.equal(read_image(tmp_path / "back/03.png"), images[3])
    assert len(files(tmp_path / "back")) == 11


@pytest.fixture(scope="module")
def integer(tmp_path_factory):
    """A run whose levels are models of integers by themselves."""
    folder = tmp_path_factory.mktemp("integer")
    return trained(folder / "run", 'model.pyramid="integer"')


def test_coarse_images_come_from_the_beginning_of_a_file(integer, tmp_path, capsys):
    path, back = tmp_path / "a.mrc", tmp_path / "back"
    originals = smooth_images(3)
    for i, image in enumerate(originals):
        save_image(tmp_path / f"{i}.png", image)
    given = [tmp_path / f"{i}.png" for i in range(3)]
    mrcnf_says(capsys, "compress", integer, *given, "--out", path, "--steps", 2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(container.read(path, resolution=2))])
    assert len(path.read_bytes()) < len(whole)
    assert "truncated" in refused(capsys, "decompress", path, "--run", integer, "--out", back)
    asked = ["decompress", path, "--run", integer, "--out", back, "--resolution"]
    mrcnf_says(capsys, *asked, 2)
    for i, image in enumerate(originals):
        _, coarse = haar.lift(image[None].long())
        assert torch.equal(read_image(back / f"{i}.png"), coarse[0].to(torch.uint8))
    assert "8" in refused(capsys, *asked, 8)
    assert "not whole: it is truncated" in mrcnf_says(capsys, "info", path)


MISTAKES = {
    "nothing": ("compress {run} --out {out}.mrc", "name at least one image"),
    "no image": ("compress {run} {folder}/none.png --out {out}.mrc", "none.png: there is no such"),
    "two of a name": (
        "compress {run} {folder}/2.png {run}/2.jpg --out {out}.mrc", "both come out as 2.png"
    ),
    "two of a name but for case": (
        "compress {run} {folder}/a.png {folder}/A.webp --out {out}.mrc", "rename one of them"
    ),
    "two of a name with its ending": (
        "compress {run} {folder}/a.png {folder}/A.png.webp --out {out}.mrc", "rename one of them"
    ),
    "a long name": ("compress {run} {folder}/{long}.png --out {out}.mrc", "has 201 bytes"),
    "colour for a grey model": (
        "compress {run} {folder}/colour.png --out {out}.mrc", "3 channels where 1 are needed"
    ),
    "over an image": ("compress {run} {folder}/2.png --out {folder}/2.png", "choose another --out"),
    "a folder for a file": ("compress {run} {folder}/2.png --out {folder}", "name a file in it"),
    "no run": ("compress {folder}/none {folder}/2.png --out {out}.mrc", "there is no run folder"),
    "no steps": ("compress {run} {folder}/2.png --steps 0 --out {out}.mrc", "steps must be"),
    "no file": ("decompress {folder}/none.mrc --run {run} --out {out}", "there is no such file"),
    "a picture": ("decompress {folder}/2.png --run {run} --out {out}", "2.png: it begins"),
    "a truncated file": ("decompress {folder}/cut.mrc --run {run} --out {out}", "cut.mrc: it is"),
    "a spoilt file": ("decompress {folder}/spoilt.mrc --run {run} --out {out}", "checksum of"),
    "a file for a folder": ("decompress {coded} --run {run} --out {config}", "name a folder"),
    "a folder below a file": ("decompress {coded} --run {run} --out {config}/a", "name a folder"),
    "coarse images of an exact pyramid": (
        "decompress {coded} --run {run} --out {out} --resolution 2", "share one stack of bits"
    ),
    "no run to decompress": ("decompress {coded} --run {folder}/none --out {out}", "no run folder"),
    "several sizes in one array": (
        "decompress {coded} --run {run} --out {out} --npz", "leave out --npz"
    ),
    "a picture to describe": ("info {folder}/2.png", "2.png: it begins otherwise"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(made, coded, tmp_path, capsys, mistake):
    folder, data = made.folder, coded.read_bytes()
    (folder / "cut.mrc").write_bytes(data[:-5])
    (folder / "spoilt.mrc").write_bytes(data[:-5] + b"xyzzy")
    before = files(folder)
    arguments, words = MISTAKES[mistake]
    names = {"run": made.run, "folder": folder, "config": made.config, "out": tmp_path / "out",
             "coded": coded, "long": "n" * 201}  # fmt: skip
    said = refused(capsys, *(word.format(**names) for word in arguments.split()))
    assert words in said
    assert files(folder) == before
    assert list(tmp_path.iterdir()) == []


def test_clashes_are_refused_before_any_work(made, pictures, tmp_path, capsys, monkeypatch):
    def never(*args, **options):
        raise AssertionError("the work had begun")

    monkeypatch.setattr(codec, "encode", never)
    shutil.copy(pictures / "zebra.png", tmp_path / "many-1.png")
    said = refused(
        capsys, "compress", made.run, pictures / "many.npz", tmp_path / "many-1.png",
        "--out", tmp_path / "a.mrc",
    )  # fmt: skip
    assert "many.npz and " in said and "both come out as many-1.png" in said
    monkeypatch.setattr("mrcnf.codec.pictures.read_image", never)
    given = [pictures / "zebra.png", tmp_path / "ZEBRA.png"]
    refused(capsys, "compress", made.run, *given, "--out", tmp_path / "a.mrc")


def test_a_disk_that_fills_up_leaves_nothing(made, coded, tmp_path, capsys, monkeypatch):
    written, write = [], type(tmp_path).write_bytes

    def full(path, data):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    out = tmp_path / "new" / "back"
    assert "No space left" in refused(capsys, "decompress", coded, "--run", made.run, "--out", out)
    assert len(written) == 3 and list(tmp_path.iterdir()) == []


def test_without_the_extra_a_line_says_what_to_install(made, coded, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    for arguments in (
        ["compress", made.run, made.folder / "2.png", "--out", tmp_path / "a.mrc"],
        ["decompress", coded, "--run", made.run, "--out", tmp_path / "back"],
    ):
        assert "pip install 'mrcnf[compress]'" in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []
    assert "7 images" in mrcnf_says(capsys, "info", coded)


@pytest.mark.slow
def test_nothing_else_needs_the_extras():
    """None in sys.modules makes an import fail, as on a machine without the library."""
    code = (
        "import sys; sys.modules.update(constriction=None, imagecodecs=None)\n"
        "import mrcnf.cli, mrcnf.codec, mrcnf.measure.classical"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
