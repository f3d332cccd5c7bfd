"""Levels copied together make the same model; a copy is whole or not there."""

import os
import shutil

import pytest
import torch
from ondisk import refused, same
from tiny import files, images, smooth_images, tiny, trained

import mrcnf
from mrcnf.errors import UserError
from mrcnf.measure import evaluate
from mrcnf.runs import checkpoint
from mrcnf.runs.assemble import assemble
from mrcnf.runs.tensors import read_tensors, write_tensors
from mrcnf.training.levels import train_levels


def test_levels_from_different_folders_make_the_same_model(finished, tmp_path):
    original = mrcnf.load(finished)
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, resolution in zip(parts, (4, 2), strict=True):
        trained(part, level=resolution)
    assert assemble(parts, tmp_path / "whole") == [2, 4]
    for model in (mrcnf.load(tmp_path / "whole"), checkpoint.load(parts)):
        assert same(model.state_dict(), original.state_dict())
        picked = [torch.Generator().manual_seed(3) for _ in range(2)]
        assert torch.equal(
            model.log_prob(smooth_images(), generator=picked[0]),
            original.log_prob(smooth_images(), generator=picked[1]),
        )
    assert files(tmp_path / "whole" / "level-2") == files(parts[1] / "level-2")


def test_a_level_serves_on_any_base_of_its_size(tmp_path):
    """It knows of the coarser levels no more than the image that they make."""
    base = trained(tmp_path / "two", "train.steps=1", level=2)
    upper = trained(tmp_path / "three", "train.steps=1", "model.resolutions=[1,2,4]", level=4)
    assert assemble([base, upper], tmp_path / "joined") == [2, 4]
    model = mrcnf.load(tmp_path / "joined")
    assert model.resolutions == (2, 4)
    assert model.sample(2).shape == (2, 1, 4, 4)
    for level in model:
        alone = checkpoint.load_level(tmp_path / "joined", level.resolution)
        bits = [evaluate.level_bits(one, smooth_images()) for one in (level, alone)]
        assert torch.equal(*bits)


def test_assembling_over_a_level_changes_nothing(finished, tmp_path):
    target = tmp_path / "out"
    (target / "level-4").mkdir(parents=True)
    refused(target / "level-4", lambda: assemble([finished], target))
    assert [p.name for p in target.iterdir()] == ["level-4"]


def test_a_failed_copy_leaves_no_half_level(finished, tmp_path, monkeypatch):
    def fail(source, target, **options):
        os.makedirs(target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", fail)
    refused(finished, lambda: assemble([finished], tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A run of ordinary size, where tensors outweigh their names; not to be changed."""
    return trained(tmp_path_factory.mktemp("wide") / "run", "field.width=32", "train.steps=20")


def test_half_copies_are_for_use(wide, tmp_path):
    half = tmp_path / "half"
    assert assemble([wide], half, half=True) == [2, 4]
    names = {"config.toml", "metrics.jsonl", checkpoint.WEIGHTS}
    assert [p.name for p in half.iterdir() if p.name.startswith(".")] == []
    for level in mrcnf.load(half):
        assert all(p.dtype == torch.float32 for p in level.parameters())
        old, new = (checkpoint.level_folder(run, level.resolution) for run in (wide, half))
        assert {p.name for p in new.iterdir()} == names
        assert (new / "config.toml").read_bytes() == (old / "config.toml").read_bytes()
        assert (new / "metrics.jsonl").read_bytes() == (old / "metrics.jsonl").read_bytes()
        size, whole = ((f / checkpoint.WEIGHTS).stat().st_size for f in (new, old))
        assert 0.45 < size / whole < 0.6
        before, metadata = read_tensors(old / checkpoint.WEIGHTS)
        after, same_metadata = read_tensors(new / checkpoint.WEIGHTS)
        assert same_metadata == metadata
        parameters = {name for name, _ in level.named_parameters()}
        for name, value in before.items():
            expected = value.half() if name in parameters else value
            assert torch.equal(after[name], expected) and after[name].dtype == expected.dtype
    bits = [evaluate.evaluate(mrcnf.load(run), images()).bpd for run in (wide, half)]
    assert bits[0] != bits[1] == pytest.approx(bits[0], abs=1e-4)


def test_half_copies_of_half_copies_are_the_same(finished, tmp_path):
    assemble([finished], tmp_path / "half", half=True)
    assemble([tmp_path / "half"], tmp_path / "again", half=True)
    paths = [tmp_path / run / "level-4" / checkpoint.WEIGHTS for run in ("half", "again")]
    (half, metadata), (again, same_metadata) = map(read_tensors, paths)
    assert same(again, half) and same_metadata == metadata
    assert all(again[name].dtype == half[name].dtype for name in half)


def test_weights_beyond_float16_are_not_halved(run, tmp_path):
    path = run / "level-4" / checkpoint.WEIGHTS
    tensors, metadata = read_tensors(path)
    name, _ = next(mrcnf.load(run).level(4).named_parameters())
    tensors[name].view(-1)[0] = -70000.0
    write_tensors(path, tensors, metadata)
    out = tmp_path / "half"
    message = refused(path, lambda: assemble([run], out, half=True))
    assert f"{name} reaches 7e+04" in message and "--half" in message
    assert not out.exists()
    tensors[name].view(-1)[0] = -65504.0
    tensors["units.mean"].fill_(70000.0)  # buffers keep their width
    write_tensors(path, tensors, metadata)
    assemble([run], out, half=True)
    assert torch.equal(mrcnf.load(out).level(4).units.mean, tensors["units.mean"])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_half_copy_leaves_no_level(finished, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        assemble([finished], tmp_path / "out", half=True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("resume", [True, False])
def test_weights_without_a_state_are_not_trained_over(finished, tmp_path, resume):
    half = tmp_path / "half"
    assemble([finished], half, half=True)
    before = files(half)
    folder = half / "level-4"
    message = refused(folder, lambda: trained(half, level=4, resume=resume))
    assert "no state to resume from" in message
    refused(folder, lambda: train_levels(tiny(), [4], half, resume=resume))
    assert files(half) == before
    trained(tmp_path / "polished", f"train.init={half}", level=4)
