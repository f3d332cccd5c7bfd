"""The checked tensor file: what is read is what was written, or an error that names the file."""

import os
import pickle

import pytest
import torch
from ondisk import refused, same
from safetensors.torch import save_file
from tiny import trained

import mrcnf
from mrcnf.errors import UserError
from mrcnf.runs import checkpoint
from mrcnf.runs.tensors import read_metadata, read_tensors, write_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64)}
METADATA = {"words": ["ü", 1.5, None], "level": {"4": True}}


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_tensors_and_metadata_are_read_as_written(tmp_path):
    path = tmp_path / "new" / "file"
    write_tensors(path, TENSORS, METADATA)
    tensors, metadata = read_tensors(path)
    assert same(tensors, TENSORS) and metadata == METADATA
    assert tensors["b"].dtype == torch.int64
    assert read_metadata(path) == METADATA


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, TENSORS, METADATA)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, lambda: read_tensors(path))
        refused(path, lambda: read_metadata(path))


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, TENSORS, METADATA)
    whole, noticed = path.read_bytes(), 0
    bits = range(0, 8 * len(whole), 7)  # every place within a byte, everywhere
    for bit in bits:
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        try:
            tensors, metadata = read_tensors(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            noticed += 1
        else:
            assert same(tensors, TENSORS) and metadata == METADATA
    assert noticed > 0.95 * len(bits)


def test_weights_of_another_program_are_refused(run):
    path = run / "level-4" / checkpoint.WEIGHTS
    save_file(TENSORS, path)
    assert "not written by mrcnf" in refused(path, lambda: mrcnf.load(run))


@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE])
def test_a_hostile_pickle_is_not_executed(run, dump, name, tmp_path):
    victim = tmp_path / "executed"
    path = run / "level-4" / name
    with open(path, "wb") as file:
        dump(Payload(victim), file)
    if name == checkpoint.WEIGHTS:
        refused(path, lambda: mrcnf.load(run))
        refused(path, lambda: checkpoint.describe(run))
    else:
        refused(path, lambda: trained(run, level=4, resume=True))
    assert not victim.exists()
    with open(path, "rb") as file:  # it would have worked on a careless reader
        if dump is pickle.dump:
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert victim.exists()


def test_nothing_is_ever_unpickled(run, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    mrcnf.load(run)
    trained(run, "train.steps=5", resume=True)


def test_files_of_another_format_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("mrcnf.runs.tensors.FORMAT", "mrcnf-1")
    run = trained(tmp_path / "run", "train.steps=1")
    monkeypatch.undo()
    for read in (checkpoint.load, checkpoint.describe):
        with pytest.raises(UserError, match=r"'mrcnf-1', this version reads.*train it again"):
            read(run)


def test_a_file_that_is_missing_or_unreadable_is_named(tmp_path):
    for read in (read_tensors, read_metadata):
        assert "there is no file" in refused(
            tmp_path / "none", lambda read=read: read(tmp_path / "none")
        )
        refused(tmp_path, lambda read=read: read(tmp_path))
