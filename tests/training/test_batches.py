"""Where a step's images come from makes no difference to it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, metrics, smooth_images, tiny, write_npz
from trainers import same, weights

from mrcnf import data, runtime
from mrcnf.errors import UserError
from mrcnf.training.batches import AHEAD, Batches
from mrcnf.training.levels import train_levels
from mrcnf.training.order import EpochOrder

CPU = torch.device("cpu")


def write_npy(folder, count=12):
    """The images of `write_npz`, for `npy:`."""
    folder.mkdir(parents=True)
    for seed, split in enumerate(("train", "test")):
        np.save(folder / f"{split}.npy", smooth_images(count, seed=seed).numpy())
    return f"npy:{folder}"


@settings(max_examples=12, deadline=None)
@given(
    batch=st.sampled_from([4, 6, 12, 30]),
    pieces=st.sampled_from([1, 2]),
    steps=st.lists(st.integers(0, 9), min_size=1, max_size=8),
)
def test_any_step_has_the_images_that_it_would_have_from_memory(
    tmp_path_factory, batch, pieces, steps
):
    folder = tmp_path_factory.mktemp("npy")
    mapped = data.load(write_npy(folder / "d"))
    known = data.Images(mapped.pixels.clone(), "", "")
    for mine in (range(0, pieces, 1), range(pieces - 1, pieces, 1)):
        one, other = (
            Batches(images, EpochOrder(12, batch, 3), pieces, mine, CPU)
            for images in (mapped, known)
        )
        for step in (*steps, 4, 5, 6):  # in no order, as after resuming; and in order
            ours, theirs = list(one.of_step(step)), list(other.of_step(step))
            assert [piece for piece, _ in ours] == [piece for piece, _ in theirs] == list(mine)
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
        assert torch.equal(one.take(torch.tensor([5, 1])), known.pixels[[5, 1]])


@pytest.mark.parametrize(
    ("joint", "overrides"),
    [
        (True, ["train.micro_batches=2", "train.evaluate_every=4", "train.evaluate_images=5"]),
        (False, ["flow.kind=coupling", "flow.splits=1", "flow.shuffle=entropy",
                 "flow.reorder_every=1", "train.objective=likelihood", "model.resolutions=[4]"]),
    ],
)  # fmt: skip
def test_weights_and_logs_are_those_from_memory_bit_for_bit(tmp_path, joint, overrides):
    given = {"memory": write_npz(tmp_path / "npz"), "file": write_npy(tmp_path / "npy")}
    found = []
    for kind, name in given.items():
        recipe, run = tiny(f"data.name={name}", *overrides), tmp_path / kind
        levels = recipe.model.resolutions
        train_levels(recipe, levels, run, joint=joint, progress=False)
        found.append([(weights(run, level), metrics(run, level)) for level in levels])
    for (ours, lines), (theirs, others) in zip(*found, strict=True):
        assert same(ours, theirs) and lines == others


def test_a_run_from_memory_resumes_from_a_file(tmp_path):
    recipe = tiny(f"data.name={write_npz(tmp_path / 'npz')}")
    mapped = tiny(f"data.name={write_npy(tmp_path / 'npy')}")
    for run, first in (("a", mapped), ("b", recipe)):
        train_levels(first, [2], tmp_path / run, progress=False)
        longer = tiny(f"data.name={mapped.data.name}", "train.steps=6")
        train_levels(longer, [2], tmp_path / run, resume=True, progress=False)
    assert same(weights(tmp_path / "a", 2), weights(tmp_path / "b", 2))


def test_a_file_that_changes_stops_training_with_one_line(tmp_path):
    images = data.load(write_npy(tmp_path / "d"))
    batches = Batches(images, EpochOrder(12, 4, 0), 1, range(1), CPU)
    list(batches.of_step(0))
    os.truncate(tmp_path / "d" / "train.npy", 128)
    with pytest.raises(UserError, match="has changed"):
        for step in range(1, AHEAD + 3):  # what was read ahead may still be used
            list(batches.of_step(step))


def test_one_process_hashes_for_all(monkeypatch):
    monkeypatch.setattr(runtime, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(
        runtime.dist, "broadcast_object_list", lambda found: found.__setitem__(0, "x")
    )
    assert runtime.of_first_process(lambda: pytest.fail("has read everything")) == "x"


@pytest.mark.slow
def test_two_processes_read_a_file_to_the_weights_from_memory(tmp_path):
    given = {"memory": write_npz(tmp_path / "npz"), "file": write_npy(tmp_path / "npy")}
    (tmp_path / "tiny.toml").write_text(TINY.format(data="photos"))
    for kind, name in given.items():
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mrcnf",
             "train", str(tmp_path / "tiny.toml"), "--level", "4", "--out", str(tmp_path / kind),
             f"data.name={name}", "train.micro_batches=2"],
            check=True, timeout=240, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert same(weights(tmp_path / "memory", 4), weights(tmp_path / "file", 4))
