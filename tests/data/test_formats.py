"""Readers of published formats: order of bytes, and that damage and malice are said, not obeyed."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from writers import idx, mat, mat_element, python2_batch, random_images

from mrcnf import data
from mrcnf.errors import UserError

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# CIFAR


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, getattr, subprocess.check_output, np.load, np.fromfile]
)
def test_a_hostile_pickle_is_refused_and_nothing_runs(function, protocol, tmp_path):
    mark = tmp_path / "mark"
    table = {"data": Hostile(function, f"open({str(mark)!r}, 'w')", "x")}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(table, protocol))
    with pytest.raises(UserError, match=r"test_batch.*asks for"):
        data.load("cifar10", "test", root=tmp_path)
    assert not mark.exists()


def test_a_pickle_that_reaches_through_a_dotted_name_is_refused(tmp_path):
    reach = b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93."
    (tmp_path / "test_batch").write_bytes(reach)
    with pytest.raises(UserError, match=r"asks for numpy\.ndarray\.dumps"):
        data.load("cifar10", "test", root=tmp_path)


def test_pickles_that_claim_much_memory_get_none(tmp_path):
    good = python2_batch(random_images(2, 3, 32, 32))
    memo = good.replace(b"r\x08\x00\x00\x00", b"r\x00\x00\x00\x40")
    array = good.replace(struct.pack("<I", 2 * 3072), struct.pack("<I", 2**31 - 1))
    shape = good.replace(b"M\x02\x00M", b"J\xff\xff\xff\x7fM")
    bytearray8 = b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"."
    for bad in (memo, array, shape, bytearray8):
        assert bad != good
        assert peak_of_failing(tmp_path / "test_batch", bad, "cifar10") < 2**22


def peak_of_failing(path, content, name):
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=path.name):
            data.load(name, "test", root=path.parent)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# SVHN, Fashion-MNIST


@pytest.mark.parametrize("compress", [True, False])
def test_svhn_is_read_column_first(tmp_path, compress):
    images = random_images(3, 3, 32, 32)
    (tmp_path / "test_32x32.mat").write_bytes(mat(images, compress))
    assert np.array_equal(data.load("svhn", "test", root=tmp_path).pixels.numpy(), images)


def test_mat_files_that_claim_much_memory_get_none(tmp_path):
    good, path = mat(random_images(2, 3, 32, 32), compress=False), tmp_path / "test_32x32.mat"
    count = good.replace(struct.pack("<4i", 32, 32, 3, 2), struct.pack("<4i", 32, 32, 3, 2**30))
    size = good.replace(struct.pack("<2I", 2, 6144), struct.pack("<2I", 2, 2**32 - 1))
    body = zlib.compress(struct.pack("<2I", 14, 2**32 - 1) + bytes(100))
    packed = good[:128] + mat_element(15, body)
    for bad in (count, size, packed):
        assert bad != good
        assert peak_of_failing(path, bad, "svhn") < 2**22


def test_idx_files_that_claim_much_memory_get_none(tmp_path):
    much = struct.pack(">4I", 0x803, 2**31, 28, 28) + bytes(100)
    for name, content in (("", much), (".gz", gzip.compress(much))):
        path = tmp_path / f"t10k-images-idx3-ubyte{name}"
        assert peak_of_failing(path, content, "fashion-mnist") < 2**22
        path.unlink()


# npz


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "float32"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, "C = 1 or 3"),
        ({"images": np.zeros((2, 47), np.uint8)}, r"\(2, 47\)"),
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "no array 'images'"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "no images"),
        ({"images": np.array([{}, 1], object)}, "pickled objects"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "photo": np.array(["a"])}, "'photo'"),
    ],
)
def test_npz_of_something_else_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "train.npz", **arrays)
    with pytest.raises(UserError, match=words):
        data.load(f"npz:{tmp_path}")


def test_npz_files_that_claim_much_memory_get_none(tmp_path):
    path, header = tmp_path / "test.npz", io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (2**31, 32, 32, 3)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(100))
    long = path.read_bytes()
    np.savez_compressed(path, images=np.zeros((1, 4, 4, 3), np.uint8))
    entry = bytearray(path.read_bytes())
    struct.pack_into("<I", entry, entry.index(b"PK\1\2") + 24, 2**32 - 2)  # unpacked size
    for bad in (long, bytes(entry)):
        assert peak_of_failing(path, bad, f"npz:{tmp_path}") < 2**22


# Damage


def write_valid(kind, root):
    """A small valid data set in `root`: its name, and the file that the fuzzing spoils."""
    if kind == "cifar10":
        (root / "test_batch").write_bytes(python2_batch(random_images(1, 3, 32, 32)))
        return "cifar10", root / "test_batch"
    if kind == "svhn":
        (root / "test_32x32.mat").write_bytes(mat(np.zeros((2, 3, 32, 32), np.uint8)))
        return "svhn", root / "test_32x32.mat"
    if kind in ("idx", "idx.gz"):
        path = root / f"t10k-images-idx3-ubyte{kind[3:]}"
        content = idx(np.zeros((2, 28, 28), np.uint8))
        path.write_bytes(gzip.compress(content) if kind[3:] else content)
        return "fashion-mnist", path
    save = np.savez_compressed if kind == "npz packed" else np.savez
    save(root / "test.npz", images=random_images(2, 4, 4, 3), photo=np.array(["a", "b"]))
    return f"npz:{root}", root / "test.npz"


KINDS = ["cifar10", "svhn", "idx", "idx.gz", "npz", "npz packed"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_an_error_that_names_the_file(kind, tmp_path):
    name, path = write_valid(kind, tmp_path)
    good = path.read_bytes()
    assert len(data.load(name, "test", root=tmp_path))
    for length in (0, 1, 7, len(good) // 2, len(good) - 9, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match=path.name):
            data.load(name, "test", root=tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_give_images_or_a_user_error(kind, tmp_path):
    name, path = write_valid(kind, tmp_path)
    good = path.read_bytes()
    places = st.integers(0, len(good) - 1) | st.integers(0, min(300, len(good) - 1))

    @FUZZ
    @given(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4))
    def spoil(flips):
        bad = bytearray(good)
        for place, value in flips:
            bad[place] = value
        path.write_bytes(bad)
        try:
            got = data.load(name, "test", root=tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert got.pixels.dtype == torch.uint8 and got.pixels.ndim == 4

    spoil()


@pytest.mark.parametrize("kind", KINDS)
@given(junk=st.binary(max_size=200))
@FUZZ
def test_junk_after_a_valid_beginning_is_harmless(kind, junk, tmp_path):
    name, path = write_valid(kind, tmp_path)
    good = path.read_bytes()  # half of it at most: zeros may follow a whole gzip file
    path.write_bytes(good[: min(len(junk), len(good) // 2)] + junk)
    with pytest.raises(UserError):
        data.load(name, "test", root=tmp_path)
