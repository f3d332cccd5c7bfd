"""Packing: the same images in the same order, whole or not at all, and on from where it stopped."""

import fcntl
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from writers import random_images, write_cifar

from mrcnf import data
from mrcnf.data import packing, streams
from mrcnf.data.datasets import open_stream
from mrcnf.data.imagefile import save_image
from mrcnf.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Twelve photographs of different sizes, one of them grey."""
    for i in range(12):
        pixels = torch.from_numpy(random_images(3 if i else 1, 8 + i, 20 - i, seed=i))
        save_image(tmp_path / "photos" / f"{i}.png", pixels)
    return tmp_path / "photos"


def write_sources(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(streams, "PART", 400)  # bytes: several parts everywhere
    monkeypatch.setattr("mrcnf.data.formats.PART", 400)
    monkeypatch.setattr("mrcnf.data.mapped.PART", 400)
    names = [f"data_batch_{i}" for i in range(1, 6)]
    write_cifar(tmp_path, "cifar-10-batches-py", names, count=2)
    array, photo = random_images(50, 16, 16, 3), np.arange(50) // 2
    np.savez_compressed(tmp_path / "all.npz", images=array, photo=photo)
    np.save(tmp_path / "all.npy", array)
    np.save(tmp_path / "all.groups.npy", photo)


SOURCES = [
    ("photos", {"limit": 500}), ("cifar10", {}), ("cifar10", {"resolution": 8, "limit": 7}),
    ("npz:{}/all.npz", {}), ("npz:{}/all.npz", {"resolution": 4, "split": "test"}),
    ("npy:{}/all.npy", {"limit": 20}), ("folder:{}/photos", {"resolution": 4}),
    ("folder:{}/photos", {"resolution": 4, "crop": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), SOURCES)
@pytest.mark.parametrize("stop", [0, 1, 6])
def test_any_source_comes_back_the_same(tmp_path, folder, monkeypatch, name, options, stop):
    write_sources(tmp_path, folder, monkeypatch)
    name, split = name.format(tmp_path), options.get("split", "train")
    how = {k: v for k, v in options.items() if k in ("resolution", "crop")}
    stream = open_stream(name, root=tmp_path, **options)
    out = tmp_path / "packed" / "x.npy"
    if stop:  # at the first report of so many images

        def interrupt(done):
            if done >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            packing.pack(stream, out, name=name, split=split, **how, report=interrupt)
        assert not out.exists()
    reports = []
    found = packing.pack(stream, out, name=name, split=split, **how, report=reports.append)
    assert (reports[0] >= stop > 0) or reports[0] == stop == 0
    assert reports == sorted(reports) and reports[-1] == len(stream)
    known = data.load(name, root=tmp_path, **options)
    packed = data.load(f"npy:{out}", split)
    assert torch.equal(packed.pixels, known.pixels)
    assert packed.sha256 == known.sha256 == found.sha256
    assert np.array_equal(np.load(out), known.pixels.numpy())
    if known.groups is None:
        assert packed.groups is None
    else:
        _, expected = known.groups.unique(return_inverse=True)
        assert torch.equal(packed.groups, expected)
    assert {p.name for p in out.parent.iterdir()} <= {"x.npy", "x.info.json", "x.groups.npy"}


@pytest.mark.parametrize("other", [{"name": "other"}, {"name": "one", "options": {"seed": 1}}])
def test_what_is_left_of_something_else_is_not_gone_on_with(tmp_path, other):
    out = tmp_path / "x.npy"

    def interrupt(done):
        if done:
            raise KeyboardInterrupt

    first, second = (streams.of_array(random_images(9, 1, 4, 4, seed=i)) for i in range(2))
    with pytest.raises(KeyboardInterrupt):
        packing.pack(first, out, name="one", report=interrupt)
    packing.pack(second, out, **other)
    assert np.array_equal(np.load(out), second.array())


@pytest.mark.parametrize("harm", ["shortened", "state", "header"])
def test_damaged_remains_are_written_anew(tmp_path, harm):
    out, stream = tmp_path / "x.npy", streams.of_array(random_images(9, 1, 4, 4))

    def interrupt(done):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packing.pack(stream, out, name="one", report=interrupt)
    part, state = tmp_path / "x.npy.part", tmp_path / "x.npy.part.json"
    if harm == "state":
        state.write_text("{")
    else:
        part.write_bytes(part.read_bytes()[:150] if harm == "shortened" else b"?" * 1000)
    packing.pack(stream, out, name="one")
    assert np.array_equal(np.load(out), stream.array())


def test_mistakes_leave_everything_as_it_was(tmp_path, monkeypatch):
    stream = streams.of_array(random_images(9, 1, 4, 4))
    with pytest.raises(UserError, match=r"end the name in \.npy"):
        packing.pack(stream, tmp_path / "x.png", name="n")
    (tmp_path / "old.npy").write_bytes(b"old")
    with pytest.raises(UserError, match="is there already"):
        packing.pack(stream, tmp_path / "old.npy", name="n")
    with pytest.raises(UserError, match=r"old\.npy: .*; mend that"):
        packing.pack(stream, tmp_path / "old.npy" / "x.npy", name="n")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
        with pytest.raises(UserError, match="make room"):
            packing.pack(stream, tmp_path / "x.npy", name="n")
    assert [p.name for p in tmp_path.iterdir()] == ["old.npy"]
    with open(tmp_path / "x.npy.part", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is packing"):
            packing.pack(stream, tmp_path / "x.npy", name="n")
    packing.pack(stream, tmp_path / "x.npy", name="n")
