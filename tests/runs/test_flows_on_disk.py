"""Runs of couplings and split flows on disk: opened, joined, grown; and files older than they."""

import shutil

import pytest
import torch
from ondisk import refused, same
from tiny import files, images, tiny, trained

import mrcnf
from mrcnf.errors import UserError
from mrcnf.model.settings import FlowConfig
from mrcnf.runs import checkpoint
from mrcnf.runs.assemble import assemble
from mrcnf.runs.extend import extended_config
from mrcnf.runs.tensors import read_tensors, write_tensors
from mrcnf.training.trainer import Trainer

COUPLING = ["train.objective=likelihood", "flow.kind=coupling", "flow.couplings=2"]
SPLIT = [*COUPLING, "model.resolutions=[4,8]", "flow.splits=1", "flow.shuffle=entropy",
         "flow.prior=conditional"]  # fmt: skip


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A trained run of split couplings of levels 4 and 8; not to be changed."""
    return trained(tmp_path_factory.mktemp("split") / "run", *SPLIT, data=images(side=8))


def test_a_run_opens_as_it_was_trained(split):
    model = mrcnf.load(split)
    expected = FlowConfig("coupling", 2, 1, "entropy", "conditional")
    assert [level.flow_config for level in model] == [expected, expected]
    for level in model:
        stored, _ = read_tensors(split / f"level-{level.resolution}" / checkpoint.WEIGHTS)
        assert same(dict(level.state_dict()), stored)
        assert not torch.equal(level.flow.gates[0].shuffle.fixed, torch.arange(len(
            level.flow.gates[0].shuffle.fixed)))  # fmt: skip
        assert not level.training
    bits = model.bits_per_dim(images(side=8).pixels, generator=torch.Generator().manual_seed(1))
    assert bits.isfinite().all()


def test_levels_of_other_flows_make_one_model(tmp_path, finished):
    """A continuous base below couplings."""
    upper = trained(tmp_path / "upper", *COUPLING, level=4)
    lower = tmp_path / "lower"
    trained(lower, level=2)
    assert assemble([lower, upper], tmp_path / "joined") == [2, 4]
    model = mrcnf.load(tmp_path / "joined")
    assert [level.flow_config.kind for level in model] == ["continuous", "coupling"]
    assert model.sample(2).shape == (2, 1, 4, 4)
    assert same(model.level(2).state_dict(), mrcnf.load(finished).level(2).state_dict())


def test_half_copies_keep_orders_whole(split, tmp_path):
    assemble([split], tmp_path / "half", half=True)
    whole, half = mrcnf.load(split), mrcnf.load(tmp_path / "half")
    for one, other in zip(whole, half, strict=True):
        assert torch.equal(one.flow.gates[0].shuffle.fixed, other.flow.gates[0].shuffle.fixed)
        for name, value in one.named_parameters():
            torch.testing.assert_close(dict(other.named_parameters())[name], value.half().float())


def test_a_run_grows_by_a_level_of_the_same_flow(split, tmp_path):
    settings = extended_config(split, split, 16, ["train.steps=2"])
    assert settings.flow == tiny(*SPLIT).flow and settings.model.resolutions == (4, 8, 16)
    run = tmp_path / "run"
    assemble([split], run)
    before = files(run)
    Trainer(settings, 16, images(side=16), run).run(progress=False)
    after = files(run)
    assert all(after[name] == content for name, content in before.items())
    assert mrcnf.load(run).sample(1).shape == (1, 1, 16, 16)


def test_weights_of_another_flow_start_nothing(split, tmp_path):
    for change in ("flow.shuffle=random", "flow.prior=normal", "flow.couplings=3"):
        settings = tiny(*SPLIT, change, f"train.init={split}")
        with pytest.raises(UserError, match="cannot supply the starting weights: its flow is"):
            Trainer(settings, 8, images(side=8), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_of_the_same_flow_start_another_run(split, tmp_path):
    settings = tiny(*SPLIT, f"train.init={split}")
    level = Trainer(settings, 8, images(side=8), tmp_path / "run").level
    assert same(level.state_dict(), mrcnf.load(split).level(8).state_dict())


@pytest.mark.parametrize("change", ["flow.shuffle=random", "flow.prior=normal", "flow.splits=0"])
def test_another_flow_is_not_resumed(split, tmp_path, change):
    """An order that is fixed and one that is measured have the same tensors."""
    run = shutil.copytree(split, tmp_path / "run")
    plain = ["flow.shuffle=none", "flow.prior=normal"] if change == "flow.splits=0" else []
    settings = tiny(*SPLIT, *plain, change)
    with pytest.raises(UserError, match=r"checkpoint of another model: its \[flow\]"):
        Trainer(settings, 8, images(side=8), run, resume=True)


def age(path):
    """As a version before there were flows to choose wrote it."""
    tensors, metadata = read_tensors(path)
    metadata.pop("flow", None)
    metadata.get("config", {}).pop("flow", None)
    write_tensors(path, tensors, metadata)


def test_files_without_a_flow_open_resume_and_start_others(run, finished, tmp_path):
    for level in (2, 4):
        for name in (checkpoint.WEIGHTS, checkpoint.STATE):
            age(run / f"level-{level}" / name)
    opened = mrcnf.load(run)
    assert [level.flow_config for level in opened] == [FlowConfig()] * 2
    assert same(opened.state_dict(), mrcnf.load(finished).state_dict())
    trained(run, "train.steps=5", level=4, resume=True)
    assert checkpoint.describe(run)[4]["step"] == 5
    Trainer(tiny(f"train.init={run}"), 2, images(), tmp_path / "new")
    settings = tiny(*COUPLING, f"train.init={run}")
    message = refused(run, lambda: Trainer(settings, 2, images(), tmp_path / "other"))
    assert "its flow is {'kind': 'continuous'" in message
