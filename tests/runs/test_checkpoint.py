"""Runs on disk: what is read is what was written, or an error that names the file."""

import json
import os
import pickle
import shutil

import pytest
import torch
from runs import files, images, smooth_images, tiny, trained
from safetensors.torch import save_file

import mrcnf
from mrcnf import files as writing
from mrcnf.errors import UserError
from mrcnf.measure import evaluate
from mrcnf.runs import checkpoint
from mrcnf.training import trainer as train

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64)}
METADATA = {"words": ["ü", 1.5, None], "level": {"4": True}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A trained run of two levels; not to be changed."""
    return trained(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def refused(path, call):
    with pytest.raises(UserError) as error:
        call()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_tensors_and_metadata_are_read_as_written(tmp_path):
    path = tmp_path / "new" / "file"
    checkpoint.write_tensors(path, TENSORS, METADATA)
    tensors, metadata = checkpoint.read_tensors(path)
    assert same(tensors, TENSORS) and metadata == METADATA
    assert tensors["b"].dtype == torch.int64


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "file"
    checkpoint.write_tensors(path, TENSORS, METADATA)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, lambda: checkpoint.read_tensors(path))


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    path = tmp_path / "file"
    checkpoint.write_tensors(path, TENSORS, METADATA)
    whole, noticed = path.read_bytes(), 0
    bits = range(0, 8 * len(whole), 7)  # every place within a byte, everywhere
    for bit in bits:
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        try:
            tensors, metadata = checkpoint.read_tensors(path)
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


def test_a_training_state_is_not_taken_for_weights(run):
    path = run / "level-4" / checkpoint.WEIGHTS
    shutil.copy(run / "level-4" / checkpoint.STATE, path)
    assert "does not hold a level" in refused(path, lambda: mrcnf.load(run))


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


def test_a_damaged_state_offers_the_one_before(run):
    folder = run / "level-4"
    path, previous = folder / checkpoint.STATE, folder / checkpoint.PREVIOUS
    path.write_bytes(path.read_bytes()[:-9])
    message = refused(path, lambda: trained(run, level=4, resume=True))
    assert f"an older one is at {previous}" in message and "rename it" in message
    previous.rename(path)
    before = checkpoint.read_tensors(folder / checkpoint.WEIGHTS)[0]
    trained(run, level=4, resume=True)
    assert same(checkpoint.read_tensors(folder / checkpoint.WEIGHTS)[0], before)
    path.write_bytes(b"")
    (folder / checkpoint.PREVIOUS).unlink()
    assert "older" not in refused(path, lambda: trained(run, level=4, resume=True))


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, function, error):
    path = tmp_path / "file"
    writing.write(path, "old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        writing.write(path, "new")
    assert files(tmp_path) == {path.relative_to(tmp_path): b"old"}


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "run" / "a"
    assert "choose another place" in refused(path, lambda: writing.write(path, "new"))


def test_a_level_alone_counts_the_grown_models_pixels(tmp_path):
    trained(tmp_path / "run", "model.resolutions=[2]", level=2, data=images(side=2))
    trained(tmp_path / "run", "model.resolutions=[2, 4]", level=4)
    whole = checkpoint.load(tmp_path / "run")
    alone = checkpoint.load_level(tmp_path / "run", 2)
    assert alone.model == whole.level(2).model and alone.model.finest == 4
    assert same(alone.state_dict(), whole.level(2).state_dict())


def test_levels_from_different_folders_make_the_same_model(finished, tmp_path):
    original = mrcnf.load(finished)
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, resolution in zip(parts, (4, 2), strict=True):
        trained(part, level=resolution)
    assert checkpoint.assemble(parts, tmp_path / "whole") == [2, 4]
    for model in (mrcnf.load(tmp_path / "whole"), checkpoint.load(parts)):
        assert same(model.state_dict(), original.state_dict())
        picked = [torch.Generator().manual_seed(3) for _ in range(2)]
        assert torch.equal(
            model.log_prob(smooth_images(), generator=picked[0]),
            original.log_prob(smooth_images(), generator=picked[1]),
        )
    assert files(tmp_path / "whole" / "level-2") == files(parts[1] / "level-2")


def test_a_loaded_model_is_the_trained_one(tmp_path):
    trainer = train.Trainer(tiny(), 2, images(), tmp_path / "run")
    trainer.run(progress=False)
    loaded = checkpoint.load(tmp_path / "run").level(2)
    assert not loaded.training
    assert same(loaded.state_dict(), trainer.finished_level().state_dict())
    assert (loaded.field, loaded.solver) == (trainer.config.field, trainer.config.solver)


def test_a_missing_level_is_named(tmp_path):
    three = ["model.resolutions=[2,4,8]", "train.steps=1"]
    for level in (2, 8):
        trained(tmp_path / "run", *three, data=images(side=8), level=level)
    message = refused("level 4 is missing", lambda: mrcnf.load(tmp_path / "run"))
    assert "--level 4" in message


@pytest.mark.parametrize(
    ("other", "data", "word"),
    [
        ([], images(channels=3), "channels"),
        (["model.nbits=5"], images(), "nbits is"),
        (["model.base=logit"], images(), "base is"),
        (["model.dequantisation=gaussian"], images(), "dequantisation is"),
        (["model.resolutions=[4]"], images(), "it is a base level"),
    ],
)
def test_levels_of_different_models_are_not_joined(finished, tmp_path, other, data, word):
    settings = ["train.steps=1", *other]
    level = data.pixels.shape[-1]
    alien = trained(tmp_path / "alien", *settings, data=data, level=level)
    mixed = shutil.copytree(finished / "level-2", tmp_path / "mixed" / "level-2")
    shutil.copytree(alien / f"level-{level}", mixed.parent / f"level-{level}")
    message = refused("belongs to another model", lambda: mrcnf.load(mixed.parent))
    assert word in message


def test_a_level_serves_on_any_base_of_its_size(tmp_path):
    """It knows of the coarser levels no more than the image that they make."""
    base = trained(tmp_path / "two", "train.steps=1", level=2)
    upper = trained(tmp_path / "three", "train.steps=1", "model.resolutions=[1,2,4]", level=4)
    assert checkpoint.assemble([base, upper], tmp_path / "joined") == [2, 4]
    model = mrcnf.load(tmp_path / "joined")
    assert model.resolutions == (2, 4)
    assert model.sample(2).shape == (2, 1, 4, 4)


def test_the_same_level_twice_is_refused(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    refused("level 2 is in both", lambda: checkpoint.load([finished, other]))


def test_assembling_over_a_level_changes_nothing(finished, tmp_path):
    target = tmp_path / "out"
    (target / "level-4").mkdir(parents=True)
    refused(target / "level-4", lambda: checkpoint.assemble([finished], target))
    assert [p.name for p in target.iterdir()] == ["level-4"]


def test_a_failed_copy_leaves_no_half_level(finished, tmp_path, monkeypatch):
    def fail(source, target, **options):
        os.makedirs(target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", fail)
    refused(finished, lambda: checkpoint.assemble([finished], tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A run of ordinary size, where tensors outweigh their names; not to be changed."""
    return trained(tmp_path_factory.mktemp("wide") / "run", "field.width=32", "train.steps=20")


def test_half_copies_are_for_use(wide, tmp_path):
    half = tmp_path / "half"
    assert checkpoint.assemble([wide], half, half=True) == [2, 4]
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
        before, metadata = checkpoint.read_tensors(old / checkpoint.WEIGHTS)
        after, same_metadata = checkpoint.read_tensors(new / checkpoint.WEIGHTS)
        assert same_metadata == metadata
        parameters = {name for name, _ in level.named_parameters()}
        for name, value in before.items():
            expected = value.half() if name in parameters else value
            assert torch.equal(after[name], expected) and after[name].dtype == expected.dtype
    bits = [evaluate.evaluate(mrcnf.load(run), images()).bpd for run in (wide, half)]
    assert bits[0] != bits[1] == pytest.approx(bits[0], abs=1e-4)


def test_half_copies_of_half_copies_are_the_same(finished, tmp_path):
    checkpoint.assemble([finished], tmp_path / "half", half=True)
    checkpoint.assemble([tmp_path / "half"], tmp_path / "again", half=True)
    paths = [tmp_path / run / "level-4" / checkpoint.WEIGHTS for run in ("half", "again")]
    (half, metadata), (again, same_metadata) = map(checkpoint.read_tensors, paths)
    assert same(again, half) and same_metadata == metadata
    assert all(again[name].dtype == half[name].dtype for name in half)


def test_weights_beyond_float16_are_not_halved(run, tmp_path):
    path = run / "level-4" / checkpoint.WEIGHTS
    tensors, metadata = checkpoint.read_tensors(path)
    name, _ = next(mrcnf.load(run).level(4).named_parameters())
    tensors[name].view(-1)[0] = -70000.0
    checkpoint.write_tensors(path, tensors, metadata)
    out = tmp_path / "half"
    message = refused(path, lambda: checkpoint.assemble([run], out, half=True))
    assert f"{name} reaches 7e+04" in message and "--half" in message
    assert not out.exists()
    tensors[name].view(-1)[0] = -65504.0
    tensors["mean"].fill_(70000.0)  # buffers keep their width
    checkpoint.write_tensors(path, tensors, metadata)
    checkpoint.assemble([run], out, half=True)
    assert torch.equal(mrcnf.load(out).level(4).mean, tensors["mean"])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_half_copy_leaves_no_level(finished, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        checkpoint.assemble([finished], tmp_path / "out", half=True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("resume", [True, False])
def test_weights_without_a_state_are_not_trained_over(finished, tmp_path, resume):
    half = tmp_path / "half"
    checkpoint.assemble([finished], half, half=True)
    before = files(half)
    folder = half / "level-4"
    message = refused(folder, lambda: trained(half, level=4, resume=resume))
    assert "no state to resume from" in message
    refused(folder, lambda: train.train_levels(tiny(), [4], half, resume=resume))
    assert files(half) == before
    trained(tmp_path / "polished", f"train.init={half}", level=4)


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


def test_the_next_level_takes_the_finest_ones_settings(finished):
    settings = checkpoint.extended_config(finished, finished, 8, ["train.steps=9"])
    assert settings.model.resolutions == (2, 4, 8)
    assert (settings.train.steps, settings.train.batch, settings.train.init) == (9, 4, "")
    with pytest.raises(UserError, match="extend it to 8, not 16"):
        checkpoint.extended_config(finished, finished, 16)


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


TIED = ["model.dequantisation=gaussian", "field.lattice=true"]


@pytest.mark.parametrize("tie", TIED)
def test_noise_and_lattice_of_means_are_tied_to_the_finest_level(tmp_path, tie):
    run = trained(tmp_path / "run", tie, "train.steps=1")
    with pytest.raises(UserError, match=r"for 4×4 images.*model of 8×8; model\.pyramid = integer"):
        checkpoint.extended_config(run, run, 8)
    shutil.rmtree(run / "level-4")
    with pytest.raises(UserError, match=r"for 4×4 images.*model of 2×2"):
        checkpoint.load(run)
    # Integers are integers at every level.
    run = trained(tmp_path / "integers", tie, "model.pyramid=integer", "train.steps=1")
    assert checkpoint.extended_config(run, run, 8).model.resolutions == (2, 4, 8)


def test_learned_noise_is_the_finest_levels_and_hinders_no_growth(tmp_path):
    run = trained(tmp_path / "run", "model.dequantisation=variational", "train.steps=1")
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    assert [level.dequantiser is None for level in checkpoint.load(run).levels] == [True, False]
    taller = checkpoint.extended_config(run, run, 8)
    train.Trainer(taller, 8, images(side=8), run).run(progress=False)
    model = checkpoint.load(run)
    assert [level.dequantiser is None for level in model.levels] == [True, True, False]
    assert model.config.dequantisation == "variational"
    assert model.bits_per_dim(images(side=8).pixels[:2]).isfinite().all()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_below_learned_noise_it_is_uniform(tmp_path):
    run = trained(tmp_path / "run", "model.dequantisation=variational", "train.steps=1")
    shutil.rmtree(run / "level-4")
    model = checkpoint.load(run)
    assert model.config.dequantisation == "uniform"
    assert model.bits_per_dim(images(side=2).pixels[:2]).isfinite().all()


def test_noise_is_learned_on_from_noise_only(tmp_path):
    run = trained(tmp_path / "run", "model.dequantisation=variational", "train.steps=1")
    flags = [f"train.init={run}", "model.dequantisation=variational"]
    train.Trainer(tiny(*flags), 4, images(), tmp_path / "on")
    with pytest.raises(UserError, match="learned noise is False, not True"):
        train.Trainer(tiny(*flags, "model.resolutions=[2]"), 2, images(side=2), tmp_path / "off")


def test_files_of_another_format_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", "mrcnf-1")
    run = trained(tmp_path / "run", "train.steps=1")
    monkeypatch.undo()
    for read in (checkpoint.load, checkpoint.describe):
        with pytest.raises(UserError, match=r"'mrcnf-1', this version reads.*train it again"):
            read(run)
