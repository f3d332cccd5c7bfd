"""Data sets: what is promised about splits, sizes and order."""

import subprocess
import sys

import numpy as np
import pytest
import pywt
import torch
from PIL import Image
from writers import random_images

from mrcnf import data
from mrcnf.data.datasets import SPLITS
from mrcnf.errors import UserError


def test_the_package_needs_no_other_library_until_it_is_used():
    # None in sys.modules makes an import fail, as on a machine without the library.
    code = (
        "import sys; sys.modules.update(pywt=None, pooch=None); import mrcnf.data\n"
        "try: mrcnf.data.load('photos')\n"
        "except mrcnf.UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "photos need PyWavelets: pip install PyWavelets\n"


# Images


def test_the_digest_depends_on_pixels_and_shape_only():
    pixels = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
    one = data.Images(pixels, "a", "train")
    assert len(one) == 1 and len(one.sha256) == 64
    assert one.sha256 == data.Images(pixels.clone(), "b", "test", torch.zeros(1)).sha256
    assert one.sha256 != data.Images(pixels.reshape(3, 1, 4, 4), "a", "train").sha256
    assert one.sha256 != data.Images(pixels + 1, "a", "train").sha256
    strided = pixels.contiguous(memory_format=torch.channels_last)
    assert one.sha256 == data.Images(strided, "a", "train").sha256


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cifar", {}, "'cifar' is unknown; choose one of photos, cifar10"),
        ("folder:", {}, "unknown"),
        ("photos", {"split": "all"}, "choose one of train, test, val"),
        ("photos", {"resolution": 0}, "at least 1"),
        ("photos", {"limit": 0}, "at least 1"),
        ("photos", {"resolution": 129}, "at most 128"),
        ("svhn", {"split": "val"}, "train or test"),
        ("imagenet64", {}, "image-net.org"),
        ("cifar10", {}, "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
        ("svhn", {}, "http://ufldl.stanford.edu/housenumbers/train_32x32.mat"),
        ("folder:nowhere", {}, "nowhere"),
        ("npz:nowhere.npz", {}, "nowhere.npz"),
    ],
)
def test_mistakes_name_the_remedy(name, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MRCNF_DATA", raising=False)
    with pytest.raises(UserError) as error:
        data.load(name, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_is_a_folder_is_told_how_folders_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "holidays").mkdir()
    with pytest.raises(UserError, match=r"in that folder say folder:holidays$"):
        data.load("holidays")


# photos


@pytest.mark.parametrize("resolution", [8, 32, 64, 128])
def test_no_pixel_of_photos_is_in_two_splits_and_test_crops_do_not_overlap(resolution, monkeypatch):
    # Each pixel is replaced by a number of its own 8×8 cell: cells are shared by no two splits.
    cell = np.arange(512) // 8
    row, column = np.broadcast_arrays(cell[:, None], cell[None, :])
    seen = {}
    for split in SPLITS:
        stacks = []
        for plane in (row, column):
            for name in ("camera", "ascent", "aero"):
                monkeypatch.setattr(pywt.data, name, lambda p=plane: p.astype(np.uint8))
            stacks.append(data.load("photos", split, resolution=resolution).pixels[::3].long())
        cells = stacks[0] * 64 + stacks[1]
        if split != "train":
            assert torch.unique(cells, return_counts=True)[1].max() <= 64
        seen[split] = set(cells.unique().tolist())
    assert not seen["train"] & (seen["test"] | seen["val"]) and not seen["test"] & seen["val"]
    assert len(seen["test"]) == 4 * 256 and len(seen["val"]) == 2 * 256
    assert len(seen["train"]) > (8 if resolution == 128 else 10) * 200


def test_photos_are_many_and_alternate():
    train, test = data.load("photos"), data.load("photos", "test", limit=7)
    assert train.pixels.shape == (6267, 1, 32, 32) and train.pixels.dtype == torch.uint8
    assert test.groups.tolist() == [0, 1, 2, 0, 1, 2, 0] and test.groups.dtype == torch.int64
    assert torch.equal(test.pixels[1, 0], torch.from_numpy(pywt.data.ascent()[:32, 128:160]))
    assert train.sha256 == data.load("photos").sha256


# npz


def test_npz_folder_uses_its_own_splits_and_photographs(tmp_path):
    images = random_images(4, 8, 8, 3)
    np.savez_compressed(tmp_path / "val.npz", images=images, photo=np.array(["b", "a", "b", "c"]))
    got = data.load(f"npz:{tmp_path}", "val", limit=3)
    assert np.array_equal(got.pixels, images[:3].transpose(0, 3, 1, 2))
    assert got.groups.tolist() == [1, 0, 1]
    with pytest.raises(UserError, match=r"train\.npz: there is no such file"):
        data.load(f"npz:{tmp_path}")


@pytest.mark.parametrize("shape", [(300, 4, 4, 1), (300, 4, 4), (300, 48)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_one_npz_is_divided_into_train_and_test(tmp_path, shape, order):
    images = random_images(*shape)
    np.savez(tmp_path / "all.npz", data=np.asarray(images, order=order))
    splits = (data.load(f"npz:{tmp_path}/all.npz", split) for split in ("train", "test"))
    train, test = (images.pixels.numpy() for images in splits)
    assert 15 <= len(test) <= 45 and len(train) + len(test) == 300
    rows = {row.tobytes() for row in np.concatenate([train, test])}
    assert rows == {row.tobytes() for row in images.reshape(len(images), -1)}
    # Fixed for ever: the same images are held out on every machine and by every later version.
    images = images.reshape(len(images), *train.shape[1:])
    assert np.array_equal(test[:5], images[[8, 14, 23, 25, 26]])
    with pytest.raises(UserError, match="supply val"):
        data.load(f"npz:{tmp_path}/all.npz", "val")


def test_one_npz_with_photographs_keeps_each_on_one_side(tmp_path):
    photo = np.array([f"p{i % 50}" for i in range(400)])
    images = np.repeat(np.arange(400) % 50, 16).reshape(400, 4, 4).astype(np.uint8)
    np.savez(tmp_path / "all.npz", images=images, photo=photo)
    train, test = (data.load(f"npz:{tmp_path}/all.npz", s) for s in ("train", "test"))
    assert len(train) + len(test) == 400 and len(test) % 8 == 0
    assert not set(train.pixels.unique().tolist()) & set(test.pixels.unique().tolist())
    assert len(test.groups.unique()) == len(test) // 8


# Folders


def write_png(path, *shape, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random_images(*shape, seed=seed)
    Image.fromarray(pixels).save(path)
    return pixels


def test_folder_is_sorted_recursive_and_mixes_grey_with_colour(tmp_path):
    late = write_png(tmp_path / "train" / "z.png", 4, 6, 3)
    early = write_png(tmp_path / "train" / "a" / "ä b.PNG", 4, 6)
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "._z.png").write_bytes(b"metadata of another system")
    got = data.load(f"folder:{tmp_path}").pixels.numpy()
    assert got.shape == (2, 3, 4, 6)
    assert (got[0] == early).all() and np.array_equal(got[1], late.transpose(2, 0, 1))
    with pytest.raises(UserError, match="test: there is no such folder"):
        data.load(f"folder:{tmp_path}", "test")


@pytest.mark.parametrize("folders", [("train", "test"), ("", "")])
def test_a_split_of_grey_files_is_colour_where_the_other_is(tmp_path, folders):
    for name, folder, depth in (("a", folders[0], 3), ("b", folders[1], 1)):
        write_png(tmp_path / folder / f"{name}.png", 4, 4, *([3] if depth == 3 else []))
    splits = [data.load(f"folder:{tmp_path}", s).pixels for s in ("train", "test")]
    assert [p.shape[1:] for p in splits] == [(3, 4, 4)] * 2


def test_folder_without_subfolders_is_divided_by_name(tmp_path):
    for i in range(100):
        write_png(tmp_path / f"{i}.png", 2, 2, seed=i)
    train, test = (data.load(f"folder:{tmp_path}", s).pixels for s in ("train", "test"))
    assert len(train) + len(test) == 100 and 2 <= len(test) <= 25
    for i in range(100, 120):
        write_png(tmp_path / f"{i}.png", 2, 2, seed=i)
    more = data.load(f"folder:{tmp_path}", "test").pixels
    kept = {p.numpy().tobytes() for p in more}
    assert {p.numpy().tobytes() for p in test} <= kept  # more files never move one across
    with pytest.raises(UserError, match="supply val"):
        data.load(f"folder:{tmp_path}", "val")


def test_folder_with_nothing_in_the_split_says_so(tmp_path):
    write_png(tmp_path / "a.png", 2, 2)
    empty = "test" if len(data.load(f"folder:{tmp_path}")) else "train"
    with pytest.raises(UserError, match=f"split '{empty}' has no images"):
        data.load(f"folder:{tmp_path}", empty)


def test_folder_sizes(tmp_path):
    wide = write_png(tmp_path / "train" / "a.png", 8, 12, 3)
    write_png(tmp_path / "train" / "b.png", 9, 8, 3)
    with pytest.raises(UserError, match=r"a\.png is 12×8 but b\.png is 8×9; give a resolution"):
        data.load(f"folder:{tmp_path}")
    got = data.load(f"folder:{tmp_path}", resolution=4).pixels
    square = wide[:, 2:10].astype(float).reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert got.shape == (2, 3, 4, 4)
    assert np.abs(got[0].numpy() - square.transpose(2, 0, 1)).max() <= 0.5  # rounded once
    with pytest.raises(UserError, match=r"a\.png: 12×8 is smaller than the resolution 16"):
        data.load(f"folder:{tmp_path}", resolution=16)
    with pytest.raises(UserError, match="no image files"):
        data.load(f"folder:{(tmp_path / 'val').mkdir() or tmp_path}", "val")


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_some_photograph_is_always_test_and_some_is_train(tmp_path, count):
    for first in range(0, 60, 3):
        folder = tmp_path / str(first)
        for i in range(first, first + count):
            write_png(folder / f"{i}.png", 2, 2, seed=i)
        train, test = (data.load(f"folder:{folder}", split) for split in ("train", "test"))
        assert len(train) >= 1 and len(test) >= 1 and len(train) + len(test) == count


def test_photographs_are_cut_at_their_own_resolution(tmp_path):
    whole = write_png(tmp_path / "train" / "a.png", 11, 9, 3)
    grey = write_png(tmp_path / "train" / "b.png", 4, 4)
    got = data.load(f"folder:{tmp_path}", resolution=4, crop=100)
    corners = [(y, x) for y in (0, 2, 4, 6) for x in (0, 2, 4)]  # every half side, in the middle
    assert got.groups.tolist() == [0] * len(corners) + [1] and got.shape == (13, 3, 4, 4)
    for crop, (y, x) in zip(got.pixels.numpy(), corners, strict=False):
        assert np.array_equal(crop, whole[y : y + 4, x : x + 4].transpose(2, 0, 1))
    assert (got.pixels[-1].numpy() == grey).all()
    (tmp_path / "train").rename(tmp_path / "test")
    got = data.load(f"folder:{tmp_path}", "test", resolution=4, crop=100)  # none overlap
    assert got.groups.tolist() == [0] * 4 + [1]
    assert np.array_equal(got.pixels[3], whole[5:9, 4:8].transpose(2, 0, 1))


def test_fewer_crops_are_some_of_more_and_others_for_another_name(tmp_path):
    pixels = write_png(tmp_path / "train" / "a.png", 40, 40, 3)
    Image.fromarray(pixels).save(tmp_path / "train" / "b.png")

    def crops(most, split="train"):
        got = data.load(f"folder:{tmp_path}", split, resolution=8, crop=most)
        assert got.groups.bincount().tolist() == [most] * 2
        return [p.numpy().tobytes() for p in got.pixels]

    few, many = crops(4), crops(30)
    assert set(few[:4]) < set(many[:30]) and set(few[4:]) < set(many[30:])
    assert set(few[:4]) != set(few[4:]) and crops(4) == few


def test_mistakes_about_crops(tmp_path):
    write_png(tmp_path / "train" / "a.png", 8, 3)
    name = f"folder:{tmp_path}"
    with pytest.raises(UserError, match=r"a\.png: 3×8 is smaller than the resolution 4"):
        data.load(name, resolution=4, crop=2)
    with pytest.raises(UserError, match="say the resolution of the crops"):
        data.load(name, crop=2)
    with pytest.raises(UserError, match="crop -1"):
        data.load(name, resolution=2, crop=-1)
    with pytest.raises(UserError, match="crop 2: of folder:PATH alone"):
        data.load("photos", crop=2)


def test_photographs_on_their_side_are_turned_before_they_are_cut(tmp_path):
    pixels, exif = random_images(8, 4, 3), Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "train" / "a.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path, exif=exif)
    got = data.load(f"folder:{tmp_path}", resolution=4, crop=3).pixels  # 4×8 when turned
    assert len(got) == 3
    assert np.array_equal(got[0], np.rot90(pixels, -1)[:, :4].transpose(2, 0, 1))
