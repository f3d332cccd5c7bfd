"""Settings: every number has a range, and what is outside of it is the user's mistake."""

import dataclasses
import math
import tomllib
import typing

import pytest
from tiny import tiny

from mrcnf.errors import UserError
from mrcnf.runs.ranges import Choice, Range
from mrcnf.runs.settings import DataConfig, EvaluateConfig, TrainConfig

SECTIONS = {"data": DataConfig, "train": TrainConfig, "evaluate": EvaluateConfig}


@pytest.mark.parametrize(
    ("assignment", "allowed"),
    [
        ("train.weight_decay=nan", "at least 0 and finite"),
        ("train.weight_decay=inf", "at least 0 and finite"),
        ("train.weight_decay=-0.1", "at least 0 and finite"),
        ("train.learning_rate=inf", "above 0 and finite"),
        ("train.learning_rate=nan", "above 0 and finite"),
        ("train.warmup=-5", "at least 0"),
        ("train.kinetic=-1.0", "at least 0 and finite"),
        ("train.kinetic=nan", "at least 0 and finite"),
        ("train.kinetic=inf", "at least 0 and finite"),
        ("train.frobenius=-1.0", "at least 0 and finite"),
        ("train.frobenius=nan", "at least 0 and finite"),
        ("train.minutes=nan", "at least 0 and finite"),
        ("train.minutes=inf", "at least 0 and finite"),
        ("train.clip=nan", r"above 0 \(inf: no limit\)"),
        ("train.clip=-1.0", r"above 0 \(inf: no limit\)"),
        ("train.skip_above=nan", r"above 0 \(inf: no limit\)"),
        ("train.times_centre=nan", "a finite number"),
        ("train.times_centre=-inf", "a finite number"),
        ("train.times_spread=inf", "above 0 and finite"),
        ("train.ema=nan", r"in \[0, 1\)"),
        ("train.beta2=nan", r"in \[0, 1\)"),
        ("train.steer=nan", r"in \[0, 1\)"),
        ("train.steer=-0.1", r"in \[0, 1\)"),
        ("train.crop=-2", "at least 0"),
        ("train.evaluate_every=-1", "at least 0"),
        ("train.evaluate_images=1", "at least 2"),
        ("train.checkpoint_every=0", "at least 1"),
        ("data.limit=-1", "at least 0"),
        ("evaluate.limit=-1", "at least 0"),
        ("evaluate.draws=0", "at least 1"),
        ("evaluate.seed=10000000000000000", r"within ±10\^12"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_range(assignment, allowed):
    name, _, value = assignment.partition("=")
    with pytest.raises(UserError, match=rf"{name} must be .*{allowed}.*, got {value}$") as error:
        tiny(assignment)
    assert "\n" not in str(error.value)
    if not name.startswith("data."):  # common to all levels
        with pytest.raises(UserError, match=rf"\[level\.4\]: {name} must be"):
            tiny(f"level.4.{assignment}")


@pytest.mark.parametrize(
    "assignment",
    [
        "train.skip_above=inf", "train.clip=inf", "train.weight_decay=0", "train.warmup=0",
        "train.kinetic=0", "train.frobenius=0", "train.minutes=0.1", "train.times_centre=-3",
        "train.ema=0", "train.steer=0", "train.seed=-1", "evaluate.seed=-1", "evaluate.limit=0",
        "evaluate.compile=true",
    ],
)  # fmt: skip
def test_the_ends_of_ranges_are_allowed(assignment):
    key, _, value = assignment.partition("=")
    section, _, name = key.partition(".")
    got = getattr(getattr(tiny(assignment), section), name)
    assert got == tomllib.loads(f"value = {value}")["value"]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_has_a_range_that_knows_nan_and_its_default(section):
    kind = SECTIONS[section]
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        rules = getattr(hints[field.name], "__metadata__", ())
        if type(field.default) not in (int, float) or (section, field.name) == ("train", "seed"):
            assert all(isinstance(rule, Choice) for rule in rules)
            continue
        (rule,) = rules
        assert isinstance(rule, Range) and rule.holds(field.default), field.name
        assert not rule.holds(math.nan), field.name


def test_a_batch_is_whole_micro_batches():
    with pytest.raises(UserError, match=r"train\.batch 4 must be a multiple of micro_batches 3"):
        tiny("train.micro_batches=3")
