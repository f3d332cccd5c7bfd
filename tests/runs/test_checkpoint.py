"""Runs on disk: levels are saved, found, opened and described, or a line says why not."""

import json
import shutil

import pytest
from ondisk import refused, same
from tiny import images, tiny, trained

import mrcnf
from mrcnf.runs import checkpoint
from mrcnf.runs.tensors import read_tensors
from mrcnf.training import trainer as train


def test_a_training_state_is_not_taken_for_weights(run):
    path = run / "level-4" / checkpoint.WEIGHTS
    shutil.copy(run / "level-4" / checkpoint.STATE, path)
    assert "does not hold a level" in refused(path, lambda: mrcnf.load(run))


def test_a_damaged_state_offers_the_one_before(run):
    folder = run / "level-4"
    path, previous = folder / checkpoint.STATE, folder / checkpoint.PREVIOUS
    path.write_bytes(path.read_bytes()[:-9])
    message = refused(path, lambda: trained(run, level=4, resume=True))
    assert f"an older one is at {previous}" in message and "rename it" in message
    previous.rename(path)
    before = read_tensors(folder / checkpoint.WEIGHTS)[0]
    trained(run, level=4, resume=True)
    assert same(read_tensors(folder / checkpoint.WEIGHTS)[0], before)
    path.write_bytes(b"")
    (folder / checkpoint.PREVIOUS).unlink()
    assert "older" not in refused(path, lambda: trained(run, level=4, resume=True))


def test_a_level_alone_counts_the_grown_models_pixels(tmp_path):
    trained(tmp_path / "run", "model.resolutions=[2]", level=2, data=images(side=2))
    trained(tmp_path / "run", "model.resolutions=[2, 4]", level=4)
    whole = checkpoint.load(tmp_path / "run")
    alone = checkpoint.load_level(tmp_path / "run", 2)
    assert alone.model == whole.level(2).model and alone.model.finest == 4
    assert same(alone.state_dict(), whole.level(2).state_dict())


def test_a_loaded_model_is_the_trained_one(tmp_path):
    trainer = train.Trainer(tiny(), 2, images(), tmp_path / "run")
    trainer.run(progress=False)
    loaded = checkpoint.load(tmp_path / "run").level(2)
    assert not loaded.training
    assert same(loaded.state_dict(), trainer.update.averaged_state())
    assert (loaded.field, loaded.solver) == (trainer.config.field, trainer.config.solver)


def test_the_same_level_twice_is_refused(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    refused("level 2 is in both", lambda: checkpoint.load([finished, other]))


@pytest.mark.parametrize("every", [2, 4])
def test_a_kill_before_the_first_weights_changes_nothing(tmp_path, monkeypatch, every):
    setting, folder = f"train.checkpoint_every={every}", tmp_path / "killed" / "level-4"
    whole = trained(tmp_path / "whole", setting, level=4)

    def dying(*args):
        raise SystemExit

    monkeypatch.setattr(checkpoint, "save_level", dying)
    with pytest.raises(SystemExit):
        trained(tmp_path / "killed", setting, level=4)
    monkeypatch.undo()
    assert (folder / checkpoint.STATE).exists() and not (folder / checkpoint.WEIGHTS).exists()
    trained(tmp_path / "killed", setting, level=4, resume=True)
    one, other = (checkpoint.load_level(r, 4) for r in (folder.parent, whole))
    assert same(one.state_dict(), other.state_dict())


def test_what_is_not_a_run(tmp_path):
    refused(tmp_path / "none", lambda: mrcnf.load(tmp_path / "none"))
    assert "no trained level" in refused(tmp_path, lambda: mrcnf.load(tmp_path))


def test_weights_explain_themselves(finished):
    described = checkpoint.describe(finished)
    assert list(described) == [2, 4]
    for resolution, metadata in described.items():
        assert metadata["resolution"] == resolution
        assert (metadata["step"], metadata["steps"]) == (4, 4)
        assert metadata["data"] == images().sha256
        level = mrcnf.load(finished).level(resolution)
        assert metadata["parameters"] == sum(p.numel() for p in level.parameters())
    assert images().sha256 in (finished / "level-4" / "config.toml").read_text()
    assert json.loads((finished / "level-4" / "metrics.jsonl").read_text().splitlines()[-1])


def test_what_a_run_lacks_is_noted(finished, tmp_path):
    assert checkpoint.unfinished(finished) == []
    run = trained(tmp_path / "run", level=2)
    stopped = train.Trainer(tiny("train.steps=9"), 2, images(), tmp_path / "half")
    stopped.step()
    stopped.save()
    assert checkpoint.unfinished(run) == ["level 4 is not trained yet"]
    assert checkpoint.unfinished(tmp_path / "half") == [
        "level 2 is at step 1 of 9",
        "level 4 is not trained yet",
    ]


def test_a_level_in_the_folder_of_another_is_refused(run):
    shutil.move(run / "level-4", run / "level-8")
    path = run / "level-8" / checkpoint.WEIGHTS
    assert "holds a level 4" in refused(path, lambda: mrcnf.load(run))
