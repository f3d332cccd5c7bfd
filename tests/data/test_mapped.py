"""Images in a .npy file: the same as in memory, read as asked for, and changes of it are said."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from writers import random_images

from mrcnf import data
from mrcnf.data.mapped import Mapped
from mrcnf.errors import UserError


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


@pytest.mark.parametrize("shape", [(30, 3, 4, 5), (30, 4, 5, 3), (30, 4, 5), (30, 1, 4, 5)])
def test_each_arrangement_gives_the_same_as_in_memory(tmp_path, shape):
    array = random_images(*shape)
    save(tmp_path / "train.npy", array)
    mapped = data.load(f"npy:{tmp_path}")
    array = array[..., None] if array.ndim == 3 else array
    array = array if array.shape[1] in (1, 3) else array.transpose(0, 3, 1, 2)
    known = data.Images(torch.from_numpy(array.copy()), "known", "train")
    assert mapped.mapped and not known.mapped
    assert mapped.shape == known.shape == tuple(mapped.pixels.shape)
    assert torch.equal(mapped.pixels, known.pixels) and mapped.sha256 == known.sha256
    index = torch.tensor([7, 29, 0, 7])
    assert torch.equal(mapped.take(index), known.pixels[index])
    assert mapped.take(index).is_contiguous()
    assert mapped.first(9).sha256 == known.first(9).sha256 != known.sha256
    with pytest.raises(IndexError):
        mapped.take(torch.tensor([30]))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.lists(st.booleans(), min_size=60, max_size=60), st.data())
def test_parts_of_streams_are_parts_of_arrays(count, kept, draw):
    array = random_images(count, 1, 2, 2)
    rows = np.array(kept[:count])
    limit, start = draw.draw(st.integers(1, 70)), draw.draw(st.integers(0, 70))
    stream = data.Images(torch.from_numpy(array), "", "").stream().chosen(rows).first(limit)
    expected = array[rows][:limit]
    assert len(stream) == len(expected) and np.array_equal(stream.array(), expected)
    parts = list(stream.parts(start))
    assert sum(map(len, parts)) == max(0, len(expected) - start)
    assert not parts or np.array_equal(np.concatenate(parts), expected[start:])


@pytest.mark.parametrize("photo", [None, np.array([f"p{i % 40}" for i in range(300)])])
def test_one_file_is_divided_as_one_npz(tmp_path, photo):
    array = random_images(300, 4, 4, 3)
    extra = {} if photo is None else {"photo": photo}
    np.savez(tmp_path / "all.npz", images=array, **extra)
    save(tmp_path / "all.npy", array)
    if photo is not None:
        np.save(tmp_path / "all.groups.npy", photo)
    for split in ("train", "test"):
        ours = data.load(f"npy:{tmp_path}/all.npy", split, limit=100)
        theirs = data.load(f"npz:{tmp_path}/all.npz", split, limit=100)
        assert torch.equal(ours.pixels, theirs.pixels) and ours.sha256 == theirs.sha256
        assert torch.equal(ours.take(torch.arange(5)), theirs.pixels[:5])
        if photo is not None:
            assert torch.equal(ours.groups, theirs.groups)
    with pytest.raises(UserError, match="supply val"):
        data.load(f"npy:{tmp_path}/all.npy", "val")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (random_images(4, 3, 4, 4).astype(float), "holds float64"),
        (np.array([{}]), "holds object"),
        (random_images(4, 4), r"holds uint8 \(4, 4\)"),
        (random_images(4, 5, 4, 4), "must be their channels"),
        (np.asfortranarray(random_images(4, 3, 4, 4)), "Fortran order"),
        (random_images(0, 3, 4, 4), "holds no images"),
    ],
)
def test_another_array_is_refused(tmp_path, array, words):
    save(tmp_path / "test.npy", array)
    with pytest.raises(UserError, match=words):
        data.load(f"npy:{tmp_path}", "test")


def test_mistakes_are_one_line(tmp_path):
    path = save(tmp_path / "train.npy", random_images(4, 3, 4, 4))
    name = f"npy:{tmp_path}"
    with pytest.raises(UserError, match=r"test\.npy: there is no such file"):
        data.load(name, "test")
    with pytest.raises(UserError, match=f"are 4×4, not 2×2; pack them so: mrcnf pack {name}"):
        data.load(name, resolution=2)
    with pytest.raises(UserError, match="crop 3: of folder:PATH alone"):
        data.load(name, crop=3)
    np.save(tmp_path / "train.groups.npy", np.arange(3))
    with pytest.raises(UserError, match=r"train\.groups\.npy: must hold one .* 4 images"):
        data.load(name)
    (tmp_path / "train.groups.npy").unlink()
    (tmp_path / "train.info.json").write_text("{}")
    with pytest.raises(UserError, match=r"train\.info\.json: cannot be read as what was packed"):
        data.load(name).sha256  # noqa: B018
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match="bytes, where its header says"):
        data.load(name)


@pytest.mark.parametrize("change", ["truncate", "write", "replace", "remove"])
def test_a_file_that_changes_under_its_map_is_said(tmp_path, change):
    path = save(tmp_path / "train.npy", random_images(4, 3, 4, 4))
    images = data.load(f"npy:{tmp_path}")
    before = path.stat().st_mtime_ns
    if change == "truncate":
        os.truncate(path, 100)  # a read beyond its end would kill the process
    elif change == "write":
        with open(path, "r+b") as file:
            file.write(b"X")
        os.utime(path, ns=(before, before + 1))
    elif change == "replace":
        os.replace(save(tmp_path / "other.npy", random_images(4, 3, 4, 4)), path)
    else:
        path.unlink()
    for work in (lambda: images.take(torch.tensor([3])), lambda: images.sha256):
        with pytest.raises(UserError, match=r"train\.npy: has changed since it was opened"):
            work()


def test_a_noted_hash_is_believed_until_the_file_is_written_to(tmp_path):
    path = save(tmp_path / "train.npy", random_images(4, 3, 4, 4))
    state, name = path.stat(), f"npy:{tmp_path}"
    true = data.load(name).sha256
    noted = {"name": "n", "split": "train", "resolution": 0, "crop": 0, "shape": [4, 3, 4, 4],
             "sha256": "noted", "size": state.st_size, "modified": state.st_mtime_ns}
    (tmp_path / "train.info.json").write_text(json.dumps(noted))
    assert data.load(name).sha256 == "noted"
    assert data.load(name, limit=4).sha256 == "noted"
    assert data.load(name, limit=3).sha256 == data.Images(data.load(name).pixels[:3], "", "").sha256
    os.utime(path)
    assert data.load(name).sha256 == true
    with pytest.raises(UserError, match="is of the split train; pack test beside it"):
        data.load(f"npy:{path}", "test")
    assert len(data.load(f"npy:{path}")) == 4


def test_nothing_is_copied_on_opening(tmp_path):
    path = save(tmp_path / "train.npy", random_images(8, 3, 4, 4))
    mapped = Mapped(path)
    assert np.shares_memory(mapped.tensor().numpy(), mapped.first(3).tensor().numpy())


def test_a_split_without_images_is_refused(tmp_path):
    np.save(tmp_path / "few.npy", random_images(3, 4, 4))  # none of three is test
    with pytest.raises(UserError, match="split 'test' has no images"):
        data.load(f"npy:{tmp_path}/few.npy", "test")
