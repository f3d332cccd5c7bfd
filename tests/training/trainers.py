"""What the tests of training share: a trainer, its weights on disk, and trouble on purpose."""

import copy
import os
import subprocess
import sys
import time

import torch
from tiny import images, metrics, tiny

from mrcnf.runs import checkpoint
from mrcnf.runs.tensors import read_tensors
from mrcnf.training.trainer import Trainer


def trainer_of(run, *overrides, level=4, data=None, resume=False, test=None):
    return Trainer(tiny(*overrides), level, data or images(), run, resume, test)


def finished(trainer):
    """A copy of the level with its weights for use."""
    with trainer.update.averaged() as level:
        return copy.deepcopy(level)


def weights(run, level):
    return read_tensors(run / f"level-{level}" / checkpoint.WEIGHTS)[0]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def poisoned(trainer, value, steps):
    """Let the loss of certain steps have gradients of this value."""
    forward = trainer.objective.forward

    def wrapped(batch, generator):
        loss, parts = forward(batch, generator)
        factor = value if trainer.step_number in steps else 1.0
        return loss * torch.tensor(factor), parts

    trainer.objective.forward = wrapped
    return trainer


def resumed_equals_whole(recipe, run):
    Trainer(recipe.settings, 4, recipe.data, run, resume=True).run(progress=False)
    assert metrics(run, 4) == metrics(recipe.whole, 4)
    assert same(weights(run, 4), weights(recipe.whole, 4))


def command(path, run, *arguments):
    """`mrcnf train` in a process of its own."""
    return [sys.executable, "-m", "mrcnf", "train", str(path), "--out", str(run), *arguments]


def start(arguments):
    # One thread, as in this process: sums are rounded by the number of threads.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=one_thread
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
