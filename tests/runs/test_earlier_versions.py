"""Files of earlier versions: their tensors had other names; they open, resume, and start others."""

import pytest
import torch
from ondisk import same
from tiny import images, trained

from mrcnf.image.learned_noise import LearnedNoise
from mrcnf.model import level as level_module
from mrcnf.runs import checkpoint
from mrcnf.runs.tensors import read_tensors, write_tensors

EARLIER = {
    "units.": "",
    "coarse_units.": "coarse_",
    "learned_noise.": "dequantiser.",
}
SETTINGS = ["train.steps=4", "model.dequantisation=variational"]


class WithoutLinks(LearnedNoise):
    """Learned noise as it was before it leaned on the noise around it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.linked, bends = False, 2 * self.bent
        last = torch.nn.Conv2d(self.width, bends, 1)
        last.load_state_dict({k: v[:bends] for k, v in self.net[-1].state_dict().items()})
        self.net[-1] = last


def age(path):
    """Rewrite a file of tensors as an earlier version did."""
    tensors, metadata = read_tensors(path)
    aged = {}
    for name, tensor in tensors.items():
        head = "level." if name.startswith("level.") else ""
        own = name.removeprefix(head)
        for new, old in EARLIER.items():
            if own.startswith(new):
                own = old + own.removeprefix(new)
                break
        aged[head + own] = tensor
    for name in [name for name in aged if name.removeprefix("level.") == "mean"]:
        for unused in ("coarse_mean", "coarse_std"):  # a base level had them too
            head = name.removesuffix("mean")
            aged.setdefault(head + unused, aged[name][:1].clone())
    assert aged.keys() != tensors.keys()
    write_tensors(path, aged, metadata)


@pytest.fixture
def aged(tmp_path):
    """A run that an earlier version left at step 2 of 4, and the same undisturbed."""
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as then:
        then.setattr(level_module, "LearnedNoise", WithoutLinks)
        whole = trained(tmp_path / "whole", *SETTINGS)
        trained(run, *SETTINGS, "train.checkpoint_every=2", "train.steps=4")
    for level in (2, 4):
        folder = run / f"level-{level}"
        (folder / checkpoint.PREVIOUS).replace(folder / checkpoint.STATE)
        age(folder / checkpoint.STATE)
        age(folder / checkpoint.WEIGHTS)
    return run, whole


def weights(run, level):
    return read_tensors(run / f"level-{level}" / checkpoint.WEIGHTS)[0]


def test_runs_of_earlier_versions_open_and_resume(aged):
    run, whole = aged
    opened, expected = checkpoint.load(run), checkpoint.load(whole)
    assert not opened.level(4).learned_noise.linked
    assert same(opened.state_dict(), expected.state_dict())
    for level in (2, 4):
        trained(run, *SETTINGS, level=level, resume=True)
        assert same(weights(run, level), weights(whole, level))


def test_levels_of_earlier_versions_start_others(aged, tmp_path):
    run, whole = aged
    found = trained(tmp_path / "new", *SETTINGS, f"train.init={run}", level=4)
    expected = trained(tmp_path / "same", *SETTINGS, f"train.init={whole}", level=4)
    assert same(weights(found, 4), weights(expected, 4))
    # As does the level that they started, whose own noise has no links either.
    longer = [*SETTINGS, "train.steps=6"]
    found = trained(tmp_path / "new", *longer, f"train.init={run}", level=4, resume=True)
    expected = trained(tmp_path / "same", *longer, f"train.init={whole}", level=4, resume=True)
    assert same(weights(found, 4), weights(expected, 4))
    assert images().sha256 == checkpoint.describe(found)[4]["data"]


def test_a_state_without_settings_that_are_newer_resumes(aged):
    """What an earlier version did not know has its default."""
    run, whole = aged
    path = run / "level-4" / checkpoint.STATE
    tensors, metadata = read_tensors(path)
    del metadata["config"]["field"]["lattice"], metadata["config"]["model"]["whiten"]
    write_tensors(path, tensors, metadata)
    trained(run, *SETTINGS, level=4, resume=True)
    assert same(weights(run, 4), weights(whole, 4))
