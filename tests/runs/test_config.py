"""Configurations: what is written is read again, and every mistake is named with its remedy."""

import dataclasses
import math
from pathlib import Path

import pytest
from tiny import TINY, tiny

from mrcnf.errors import UserError
from mrcnf.runs import config
from mrcnf.runs.config import Config, DataConfig, TrainConfig

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))


def write(folder, text, name="some.toml"):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    "settings",
    [
        Config(),
        Config(name='quotes " and \\, ü, 図, 😀, \x7f'),
        Config(train=TrainConfig(clip=math.inf, learning_rate=1e-7)),
        tiny("level.4.train.steps=9", "level.2.solver.method=rk4", "data.name=npz:/a b/c"),
        tiny("model.resolutions=[16,32,64,128]", "data.download=true"),
        tiny("level.4.train.skip_above=inf", "data.root=größe", "level.2.trace.probes=2"),
        Config(name="two\nlines\tand \x00", data=DataConfig(root="''' # = [x]")),
    ],
)
def test_what_is_written_is_read_again(settings, tmp_path):
    assert config.load(write(tmp_path, config.to_toml(settings))) == settings


def test_numbers_are_written_to_the_last_digit():
    @dataclasses.dataclass
    class Odd:
        numbers: tuple = (math.inf, -math.inf, math.nan, 0.1 + 0.2, 5e-324, 1e300, -0.0)
        whole: int = 2**62

    read = config.tomllib.loads(config.to_toml(Odd()))
    assert repr(read) == repr(config.to_table(Odd()))  # nan is not equal to itself


def test_no_empty_tables_are_written():
    assert "[level]" not in config.to_toml(Config())
    assert "[level.4.train]\nsteps = 9\n" in config.to_toml(tiny("level.4.train.steps=9"))


def test_every_setting_is_spelled_out(tmp_path):
    text = config.to_toml(Config())
    for section in dataclasses.fields(Config):
        value = getattr(Config(), section.name)
        if dataclasses.is_dataclass(value):
            assert f"[{section.name}]\n" in text
            for setting in dataclasses.fields(value):
                if getattr(value, setting.name) != {}:
                    assert f"\n{setting.name} = " in text


def test_a_level_has_its_own_settings():
    settings = tiny("level.4.train.steps=9", "level.2.field.width=7")
    four, two = settings.at_level(4), settings.at_level(2)
    assert (four.train.steps, four.field.width) == (9, 4)
    assert (two.train.steps, two.field.width) == (4, 7)
    assert four.level == two.level == {}
    assert four.train.batch == settings.train.batch
    with pytest.raises(UserError, match=r"no level 8.*\[2, 4\]"):
        settings.at_level(8)


def test_the_name_is_the_files(tmp_path):
    assert config.load(write(tmp_path, "", "rabbit.toml")).name == "rabbit"
    assert config.load(write(tmp_path, 'name = "hare"', "rabbit.toml")).name == "hare"


@pytest.mark.parametrize(
    ("assignment", "section", "value"),
    [
        ("train.steps=7", "train", 7),
        ("train.learning_rate=1", "train", 1.0),
        ("train.learning_rate=3e-4", "train", 3e-4),
        ("train.flip=false", "train", False),
        ("train.objective=likelihood", "train", "likelihood"),
        ("train.device=cuda:1", "train", "cuda:1"),
        ('train.device="cpu"', "train", "cpu"),
        ("data.root=/a b/=c", "data", "/a b/=c"),
        ("data.root=", "data", ""),
        ("model.resolutions=[4, 8]", "model", (4, 8)),
        ("--solver.method=rk4", "solver", "rk4"),
    ],
)
def test_overrides_are_typed_as_in_toml(assignment, section, value, tmp_path):
    settings = config.load(write(tmp_path, TINY.format(data="photos")), [assignment])
    key = assignment.partition("=")[0].rpartition(".")[2]
    got = getattr(getattr(settings, section), key)
    assert got == value and type(got) is type(value)


def test_the_last_override_wins():
    assert tiny("train.steps=7", "train.steps=8").train.steps == 8


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.stps=7", ["unknown setting 'train.stps'", "did you mean train.steps?"]),
        ("trian.steps=7", ["unknown setting 'trian'", "did you mean train?"]),
        ("learning_rate=1.0", ["did you mean train.learning_rate?"]),
        ("zebra=1", ["unknown setting 'zebra'", "known here: name, data"]),
        ("level.4.train.stps=7", ["[level.4]", "did you mean train.steps?"]),
        ("level.8.train.steps=7", ["[level.8]", "[2, 4]"]),
        ("level.4.model.nbits=5", ["[level.4]", "model is common to all levels"]),
        ("train.steps=7.5", ["train.steps must be a whole number", "7.5"]),
        ("train.steps=true", ["train.steps must be a whole number"]),
        ("train.steps=many", ["train.steps must be a whole number", "'many'"]),
        ("train.flip=1", ["train.flip must be true or false"]),
        ("train.objective=2", ["train.objective must be a string"]),
        ("train.clip=high", ["train.clip must be a number"]),
        ("train=5", ["train must be a table"]),
        ("level=5", ["level must be a table"]),
        ("level.4=5", ["[level.4] must be a table"]),
        ("model.resolutions=[2,4.0]", ["must be a list of whole numbers"]),
        ("model.resolutions=4", ["must be a list of whole numbers"]),
        ("train.steps", ["not of the form section.key=value"]),
    ],
)
def test_mistakes_are_named_with_the_nearest_valid_setting(assignment, words, tmp_path):
    path = write(tmp_path, TINY.format(data="photos"))
    with pytest.raises(UserError) as error:
        config.load(path, [assignment])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "assignment",
    [
        "train.steps=0", "train.batch=-4", "train.learning_rate=0", "train.learning_rate=nan",
        "train.ema=1.0", "train.ema=-0.1", "train.steer=1.0", "train.clip=0", "train.beta2=1.0",
        "train.micro_batches=3", "train.max_skipped=0", "train.objective=magic",
        "train.times=never", "train.schedule=exponential", "train.precision=float8",
        "evaluate.batch=0", "evaluate.draws=0", "evaluate.limit=-1",
        "model.resolutions=[2,6]", "model.resolutions=[]", "model.nbits=9", "model.nbits=0",
        "model.dequantisation=none", "model.base=log", "field.kind=unet", "field.width=0",
        "solver.method=rk5", "solver.steps=-1", "solver.rtol=0.0", "solver.gradient=adjoint",
        "trace.method=guess", "trace.probes=0", "trace.kind=cauchy",
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(assignment):
    with pytest.raises(UserError, match=assignment.partition("=")[0].rpartition(".")[2]):
        tiny(assignment)


def test_a_choice_misspelt_gets_the_nearest_one():
    with pytest.raises(UserError, match="did you mean likelihood"):
        tiny("train.objective=likelihod")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no configuration at"):
        config.load(tmp_path / "missing.toml")
    with pytest.raises(UserError, match="cannot read configuration"):
        config.load(tmp_path)
    with pytest.raises(UserError, match=r"some\.toml is not valid TOML"):
        config.load(write(tmp_path, "[train\n"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read configuration"):
        config.load(tmp_path / "binary.toml")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_resolves(path):
    settings = config.load(path)
    for resolution in settings.model.resolutions:
        own = settings.at_level(resolution)
        assert config.from_table(config.to_table(own)) == own


def test_there_are_experiments():
    assert EXPERIMENTS


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("[level.4.data]\nname = 'npz:other'", "data is common to all levels"),
        ("[level.04.train]\nsteps = 7", r"level\.04.*not one of"),
        ("[level.4.train]\nsteps = 1979-05-27", "steps must be a whole number"),
        ("[train]\nsteps = 99999999999999999999", "train.steps is too large"),
        ("name = '../elsewhere'", "names no folder"),
        ("name = ''", "names no folder"),
        ("x = " + "[" * 5000, "not valid TOML"),
        ("x = " + "9" * 5000, "not valid TOML"),
    ],
)
def test_strange_files_are_one_line(tmp_path, table, words):
    path = tmp_path / "strange.toml"
    path.write_text(f"{table}\n[model]\nresolutions = [2, 4]\n")
    with pytest.raises(UserError, match=words) as error:
        config.load(path)
    assert "\n" not in str(error.value)


def test_options_go_with_the_object_that_they_are_of():
    table = {"data": {"name": "a:b", "options": {"x": 1}}, "field": {"kind": "c:d"}}
    kept = config.override(table, ["data.limit=3", "data.options.y=2", "data.name=a:b"])
    assert kept["data"] == {"name": "a:b", "limit": 3, "options": {"x": 1, "y": 2}}
    gone = config.override(table, ["data.name=photos", "field.kind=paper"])
    assert gone == {"data": {"name": "photos", "options": {}}, "field": {"kind": "paper"}}
    other = config.override(table, ["data.options.z=3", "data.name=e:f"])
    assert other["data"] == {"name": "e:f", "options": {"z": 3}}
    assert table["data"]["options"] == {"x": 1}


def test_crops_go_with_the_folder():
    table = {"data": {"name": "folder:a", "crop": 5}}
    assert config.override(table, ["data.name=folder:b"])["data"]["crop"] == 5
    assert config.override(table, ["data.name=a:b"])["data"] == {"name": "a:b"}
    assert config.override(table, ["data.name=photos", "data.crop=3"])["data"]["crop"] == 3
