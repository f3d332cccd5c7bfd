"""Published sets: found where they may lie, joined in order, fetched with their checksums."""

import dataclasses
import gzip
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from writers import (
    idx,
    python2_batch,
    python3_batch,
    python3_text_keys,
    random_images,
    write_cifar,
)

from mrcnf import data
from mrcnf.data import published
from mrcnf.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


# The sets


@pytest.mark.parametrize("writer", [python2_batch, python3_text_keys, python3_batch(4)])
def test_cifar_is_read_in_order(tmp_path, writer, monkeypatch):
    names = [f"data_batch_{i}" for i in range(1, 6)]
    images = write_cifar(tmp_path, "cifar-10-batches-py", names, writer=writer)
    write_cifar(tmp_path, "cifar-100-python", ["train", "test"], writer=writer)
    got = data.load("cifar10", root=tmp_path)
    assert np.array_equal(got.pixels.numpy(), images) and got.name == "cifar10" and not got.groups
    assert np.array_equal(data.load("cifar10", root=tmp_path, limit=4).pixels.numpy(), images[:4])
    assert len(data.load("cifar100", "test", root=tmp_path)) == 3
    monkeypatch.setenv("MRCNF_DATA", str(tmp_path))
    assert data.load("cifar10").sha256 == got.sha256
    folder = tmp_path / "cifar-10-batches-py"
    assert data.load("cifar10", root=folder).sha256 == got.sha256


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_stays_28_and_is_padded_where_asked(tmp_path, packed):
    images = random_images(4, 28, 28)
    name = "t10k-images-idx3-ubyte"
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(idx(images)) if packed else idx(images))
    load = lambda **k: data.load("fashion-mnist", "test", root=tmp_path, **k).pixels  # noqa: E731
    assert np.array_equal(load().numpy()[:, 0], images)
    wide = load(resolution=32)
    assert wide.shape == (4, 1, 32, 32) and torch.equal(wide[:, :, 2:30, 2:30], load())
    assert wide.sum() == load().sum()
    assert load(resolution=16).shape[2:] == (16, 16) and load(resolution=14).shape[2:] == (14, 14)
    with pytest.raises(UserError, match="28×28 do not come to 12×12"):
        load(resolution=12)


@pytest.mark.parametrize("below", ["", "imagenet32"])
def test_imagenet_parts_are_joined_and_val_is_test(tmp_path, below):
    (tmp_path / below).mkdir(exist_ok=True)
    parts = random_images(11, 2, 3, 32, 32)
    for i, part in enumerate(parts):
        name = f"train_data_batch_{i}.npz" if i else "val_data.npz"
        labels = np.zeros(2)
        np.savez(tmp_path / below / name, data=part.reshape(2, -1), labels=labels)
    train = data.load("imagenet32", root=tmp_path).pixels.numpy()
    assert np.array_equal(train, parts[1:].reshape(20, 3, 32, 32))
    for split in ("test", "val"):
        assert np.array_equal(data.load("imagenet32", split, root=tmp_path).pixels, parts[0])
    (tmp_path / "imagenet64").mkdir()
    np.savez(tmp_path / "imagenet64" / "val_data.npz", data=parts[0].reshape(2, -1))
    with pytest.raises(UserError, match=r"\(3, 32, 32\), not \(3, 64, 64\)"):
        data.load("imagenet64", "test", root=tmp_path)


# Downloads: the network is not asked; pooch's own part is replaced


def test_download_extracts_an_archive_and_asks_for_the_published_checksum(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")
    batch, asked = python2_batch(random_images(2, 3, 32, 32)), []

    def retrieve(url, known_hash, fname, path):
        asked.append((url, known_hash))
        with tarfile.open(Path(path) / fname, "w:gz") as archive:
            entry = tarfile.TarInfo("cifar-10-batches-py/test_batch")
            entry.size = len(batch)
            archive.addfile(entry, io.BytesIO(batch))
        return str(Path(path) / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    for _ in range(2):  # the second time there is nothing to fetch
        assert len(data.load("cifar10", "test", root=tmp_path, download=True)) == 2
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert asked == [(url, "md5:c58f30108f718f92721af3b95e74349a")]


def test_download_of_a_single_file(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")

    def retrieve(url, known_hash, fname, path):
        Path(path).mkdir(parents=True)
        (Path(path) / fname).write_bytes(gzip.compress(idx(random_images(2, 28, 28))))

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    # Without the folder of Debian's package, which may be installed here.
    own = dataclasses.replace(published.PUBLISHED["fashion-mnist"], folders=("fashion-mnist",))
    monkeypatch.setitem(published.PUBLISHED, "fashion-mnist", own)
    assert len(data.load("fashion-mnist", "test", root=tmp_path, download=True)) == 2
    with pytest.raises(UserError, match="not found"):
        data.load("fashion-mnist", root=tmp_path)


def test_failing_downloads_are_user_errors(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")

    def fail(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(UserError, match=r"train_32x32\.mat could not be downloaded \(no route to"):
        data.load("svhn", root=tmp_path, download=True)
    with pytest.raises(UserError, match=r"image-net\.org"):
        data.load("imagenet32", root=tmp_path, download=True)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(UserError, match=r"pip install 'mrcnf\[data\]'"):
        data.load("svhn", root=tmp_path, download=True)


def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")
    source = tmp_path / "elsewhere"
    source.write_bytes(b"not the published file")

    def copy(url, output_file, downloader):
        Path(output_file).write_bytes(source.read_bytes())

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda *a, **k: copy)
    with pytest.raises(UserError, match="could not be downloaded"):
        data.load("svhn", "test", root=tmp_path / "data", download=True)
    assert not list((tmp_path / "data").glob("*.mat"))


# Real files


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the checkout")
def test_the_real_cifar100(tmp_path):
    command = [sys.executable, SHARED / "unpack.py", tmp_path, "cifar100"]
    subprocess.run(command, check=True, capture_output=True)
    got = data.load("cifar100", "test", root=tmp_path)
    assert got.pixels.shape == (10000, 3, 32, 32)
    assert 110 < got.pixels.float().mean() < 130
    # Neighbours in a photograph resemble each other, which a wrong order of axes would spoil.
    x = got.pixels.float()
    assert (x[..., 1:] - x[..., :-1]).abs().mean() < 15 > (x[:, :, 1:] - x[:, :, :-1]).abs().mean()
