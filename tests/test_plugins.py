"""A user's own objects by name: found, checked, trusted, and told when they do not fit."""

import warnings

import numpy as np
import pytest
import torch
from own_code import CODE, own_run, write
from tiny import images, tiny

import mrcnf
from mrcnf import plugins
from mrcnf.data import datasets
from mrcnf.errors import UserError
from mrcnf.flows.velocity import Field
from mrcnf.runs import checkpoint, config
from mrcnf.runs.assemble import assemble
from mrcnf.training.trainer import Trainer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the test's own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    return tmp_path


def test_a_name_is_a_module_and_an_object():
    own = ["my_field:Field", "a.b_c.d:e1", "_x:_y"]
    others = ["residual", "folder:photos", "npz:x", "npy:x", "patches:4", "a:b:c", "a b:c", "a-b:c",
              ":c", "a:", "a..b:c", "./a:b", ""]  # fmt: skip
    assert [plugins.is_own(name) for name in own + others] == [True] * 3 + [False] * len(others)


def test_a_file_beside_comes_first_then_the_current_folder_then_modules(folder, monkeypatch):
    for name in ("beside", "elsewhere"):
        (folder / name).mkdir()
        (folder / name / "place.py").write_text(f"HERE = {name!r}")
    monkeypatch.syspath_prepend(folder / "elsewhere")
    assert plugins.find("place:HERE", "x") == "elsewhere"
    (folder / "place.py").write_text("HERE = 'current'")
    assert plugins.find("place:HERE", "x") == "current"
    with plugins.beside(folder / "beside"):
        assert plugins.find("place:HERE", "x") == "beside"
    (folder / "place.py").write_text("HERE = 'edited'")
    assert plugins.find("place:HERE", "x") == "edited"
    assert plugins.find("math:pi", "x") > 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:Field", r"field.kind 'nowhere:Field': there is no nowhere.py in the current fol"),
        ("own:Feild", r"own.py has no Feild; it has .*Field"),
        ("broken:Field", r"cannot be imported: SyntaxError: .*broken.py, line 1\)"),
        ("needy:Field", r"cannot be imported: ModuleNotFoundError: .*'absent'.*needy.py, line 2\)"),
        ("own:NUMBER", r"is a int, which cannot be called"),
        ("own:Flow", r"makes a Flow; a subclass of mrcnf.Field is needed"),
        ("own:Narrow", r"takes \(channels\), and is called with \(1, 0\)"),
        ("own:Failing", r"failed: ZeroDivisionError: .*own.py, line \d+\)"),
        ("own:Flat", r"answers y of shape \(2, 1, 2, 2\) with \(2, 1, 1, 1\)"),
        ("own:Unready", r"failed: AttributeError: .*own.py, line \d+\)"),
        ("own:Empty", r"has no parameters to train"),
    ],
)
def test_what_does_not_fit_as_a_field_is_said_in_a_line(folder, name, message):
    (folder / "broken.py").write_text("def (")
    (folder / "needy.py").write_text("\nimport absent")
    with pytest.raises(UserError, match=message) as refusal:
        Trainer(tiny(f"field.kind={name}", *PLAIN), 2, images(side=4), folder / "run")
    assert "\n" not in str(refusal.value) and not (folder / "run").exists()


PLAIN = ("field.width=48", "field.depth=4")
"""What a field of one's own is not told, as it is by default."""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own:Field", "a subclass of mrcnf.Flow is needed"),
        ("own:Unfinished", "must define log_prob, transport"),
        ("own:Crooked", "backwards misses where it came from by"),
        ("own:Shrinking", r"transport\(\) there must keep the shape; it answers \(2, 1, 1, 2\)"),
        ("own:Terse", r"must answer an mrcnf.FlowResult.*; it answers a Tensor"),
    ],
)
def test_what_does_not_fit_as_a_flow_is_said_in_a_line(folder, name, message):
    settings = tiny(f"flow.kind={name}", "train.objective=likelihood", *PLAIN)
    with pytest.raises(UserError, match=message):
        Trainer(settings, 2, images(), folder / "run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own:none", r"answers a NoneType; Images, a tensor or an array is needed"),
        ("own:floats", r"answers float32 of shape \(4, 1, 4, 4\); uint8 \(N, C, H, W\) is needed"),
        ("own:flat", r"answers uint8 of shape \(4, 4, 4\)"),
        ("own:unknown_option", r"takes \(split\), and is called with \('train', 4\)"),
        ("own:refusing", r"data.name 'own:refusing': no such split"),
    ],
)
def test_what_does_not_fit_as_a_data_source_is_said_in_a_line(folder, name, message):
    with pytest.raises(UserError, match=message):
        datasets.load(name, "train", resolution=4)


def test_mapped_images_of_ones_own_stay_in_their_file(folder):
    packed = datasets.open_stream("own:shades", resolution=4, options={"count": 40})
    assert [file.name for file in packed.files] == ["own.py"]  # packing begins again if it changes
    np.save("images.npy", packed.array())
    known = datasets.load("npy:images.npy", "test")
    found = datasets.load("own:mapped", "test", resolution=4)
    assert found.mapped and found.sha256 == known.sha256 and found.name == "own:mapped"
    smaller = datasets.load("own:mapped", "test", resolution=2, limit=2)
    assert not smaller.mapped and torch.equal(smaller.pixels, known.pixels[:2, :, ::2, ::2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own:vector", r"must answer a scalar loss .*; it answers a tensor of shape \(2,\)"),
        ("own:detached", r"it answers a loss without gradient"),
        ("own:number", r"it answers a float"),
        ("own:unlogged", r"beside its loss a dict of scalars"),
        ("own:none", r"takes \(split, resolution\), and is called with \(Level, Tensor, Tensor, "),
        ("own:raising", r"tried on 2 images, failed: ZeroDivisionError"),
    ],
)
def test_what_does_not_fit_as_an_objective_is_said_in_a_line(folder, name, message):
    with pytest.raises(UserError, match=message):
        Trainer(tiny(f"train.objective={name}"), 2, images(), folder / "run")
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("field.options.width=4", "field.options are of a field of your own; field.kind is resi"),
        ("data.options.count=4", "data.options are for a data.name of your own.*it is photos"),
        ("data.crop=4", "data.crop is for a data.name of the form folder:PATH; it is photos"),
        ("train.options.x=1", "train.options are for a train.objective of your own"),
        ("field.kind=own:Field", "field.width = 4 is not told to own:Field; leave it out, or say"),
        ("field.kind=fancy", "choose one of residual, paper, or MODULE:OBJECT of your own"),
        ("train.objective=fancy", "flow-matching, likelihood, or MODULE:OBJECT of your own"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        tiny(setting)


def test_options_are_told_and_written_down(folder):
    settings = tiny("field.kind=own:Field", "field.options.width=5", *PLAIN)
    again = config.from_table(config.tomllib.loads(config.to_toml(settings)))
    assert again == settings and again.field.options == {"width": 5}
    level = Trainer(settings, 2, images(), folder / "run").level
    assert level.flow.fields[0].first.out_channels == 5


def test_a_run_has_the_code_and_runs_it_only_when_it_is_trusted(folder):
    run = own_run(folder)
    (folder / "own.py").unlink()
    with pytest.raises(UserError, match=r"level-2 names code of its own \(own:Field\).*--trust"):
        mrcnf.load(run)
    with pytest.raises(UserError, match="trust=True"):
        checkpoint.load_level(run, 4)
    model = mrcnf.load(run, trust=True)
    assert model.bits_per_dim(images().pixels[:2]).isfinite().all()
    assert (run / "level-4/own.py").read_text() == CODE


def test_code_that_has_changed_is_noticed(folder):
    run = own_run(folder)
    (run / "level-4/own.py").write_text(CODE + "\n# edited\n")
    with pytest.warns(plugins.CodeChanged, match=r"level-4/own.py is not what .* was trained wit"):
        mrcnf.load(run, trust=True)
    (folder / "own.py").write_text(CODE + "\n# edited otherwise\n")
    settings = tiny("field.kind=own:Field", "train.steps=3", *PLAIN)
    with pytest.warns(plugins.CodeChanged, match=r"own.py is not what"):
        Trainer(settings, 4, images(), run, resume=True)


def test_levels_of_different_code_make_one_model(folder):
    run = own_run(folder)
    changed = CODE.replace("padding=1", "padding=1, padding_mode='circular'")
    (folder / "own.py").write_text(changed)
    other = own_run(folder, name="other")
    out = folder / "both"
    for source, level in ((run, 2), (other, 4)):
        (out / f"level-{level}").parent.mkdir(exist_ok=True)
        (source / f"level-{level}").rename(out / f"level-{level}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mrcnf.load(out, trust=True)
    modes = [level.flow.fields[0].first.padding_mode for level in model]
    assert modes == ["zeros", "circular"]


def test_it_is_the_file_that_runs_and_nothing_kept_beside_it(folder, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    for number in (1, 2):  # of one length, within a second: Python's own cache misses that
        (folder / "own.py").write_text(f"NUMBER = {number}\n")
        assert plugins.find("own:NUMBER", "x") == number
    assert not (folder / "__pycache__").exists()
    (folder / "own.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=r"imported: SyntaxError: .* \(.*own.py, line 1\)"):
        plugins.find("own:f", "x")


def test_a_copy_for_use_has_the_code(folder):
    run = own_run(folder)
    with pytest.raises(UserError, match="--trust"):
        assemble([run], folder / "small", half=True)
    assemble([run], folder / "small", half=True, trust=True)
    (folder / "own.py").unlink()
    assert len(list(mrcnf.load(folder / "small", trust=True))) == 2


def test_derivatives_of_a_field_that_is_any_code_are_those_that_it_has():
    class Cubic(Field):
        def value(self, t, y, context):
            return y**3 * t.reshape(-1, 1, 1, 1) + y.roll(1, -1)

    y = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    tangents = torch.randn(5, *y.shape, dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    value, pushed = Cubic().push(t, y, tangents, None)
    assert torch.equal(value, Cubic()(t, y))
    torch.testing.assert_close(pushed, 3 * y**2 * t * tangents + tangents.roll(1, -1))


def test_code_of_a_file_is_known_not_to_travel(folder):
    assert plugins.made_of_files([plugins.find("own:Field", "x"), int])
    assert not plugins.made_of_files([Field, int])


def test_loading_a_run_without_code_asks_for_no_trust():
    plugins.require_trust(["residual", "folder:photos", "npz:x"], "run", trust=False)


