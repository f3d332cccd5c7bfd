"""What is written down of a run, and when trouble ends it."""

import json
import math
import shutil

import pytest
import torch
from tiny import images, metrics, tiny, trained
from trainers import finished, poisoned, same, trainer_of, weights

from mrcnf.errors import TrainingError
from mrcnf.measure import evaluate
from mrcnf.model.level import Level
from mrcnf.training.trainer import Trainer


def test_the_log_says_what_was_done(tmp_path):
    run = trained(tmp_path / "run", "train.log_every=3", "train.steps=7", level=4)
    lines = (run / "level-4" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [3, 6, 7]
    for row in rows:
        assert row["images_per_s"] > 0 and row["seconds"] > 0 and row["gradient_norm"] > 0


def test_the_curve_on_test_images_changes_nothing_else(tmp_path):
    settings, data = tiny("train.evaluate_every=2", "train.evaluate_images=5"), images(seed=1)
    trainer = Trainer(settings, 4, images(), tmp_path / "run", test=data)
    trainer.run(progress=False)
    rows = metrics(tmp_path / "run", 4)
    curve = {row["step"]: row["test_bpd"] for row in rows if "test_bpd" in row}
    assert list(curve) == [2, 4]
    bits = evaluate.level_bits(finished(trainer), data.pixels[:5])
    assert curve[4] == pytest.approx(float(bits.mean()), rel=1e-6)
    plain = trained(tmp_path / "plain", level=4)
    assert same(weights(tmp_path / "run", 4), weights(plain, 4))
    assert [row for row in rows if "loss" in row] == metrics(plain, 4)


def test_what_is_compiled_is_what_is_evaluated(tmp_path, monkeypatch):
    compiled, evaluated, level_bits = [], [], evaluate.level_bits
    monkeypatch.setattr(Level, "compile", lambda level: compiled.append(level))
    monkeypatch.setattr(
        evaluate, "level_bits", lambda level, x: evaluated.append(level) or level_bits(level, x)
    )
    trainer = trainer_of(
        tmp_path, "train.compile=true", "train.evaluate_every=2", test=images(seed=1)
    )
    trainer.run(progress=False)
    assert compiled == [trainer.level]
    assert evaluated == [trainer.level, trainer.level]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # and this one
def test_bits_of_the_compiled_network_are_those_of_the_plain_one(tmp_path):
    torch._dynamo.reset()
    trainer = trainer_of(tmp_path, "train.compile=true", test=images(seed=1))
    trainer.step()
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    trainer.watch.test_bits(1, 0.0)
    assert before > 0 and counted["unique_graphs"] > before
    trainer.step()
    (row,) = metrics(tmp_path, 4)
    plain = trainer_of(tmp_path / "plain")
    plain.step()
    bits = evaluate.level_bits(finished(plain), images(seed=1).pixels)
    assert row["test_bpd"] == pytest.approx(float(bits.mean()), rel=1e-4)


def test_a_failed_solve_on_test_images_decides_nothing(tmp_path):
    settings = tiny("train.evaluate_every=2", "solver.steps=0", "solver.method=dopri5",
                    "solver.max_evaluations=2")  # fmt: skip
    trainer = Trainer(settings, 4, images(), tmp_path / "run", test=images(seed=1))
    trainer.run(progress=False)
    failed = [row["step"] for row in metrics(tmp_path / "run", 4) if "test_failed" in row]
    assert failed == [2, 4]
    assert same(weights(tmp_path / "run", 4), weights(trained(tmp_path / "plain", level=4), 4))


@pytest.mark.parametrize(
    ("settings", "value"), [((), math.nan), (("train.skip_above=1e-9",), 1.0)]
)
def test_persistent_trouble_ends_with_advice(tmp_path, settings, value):
    trainer = trainer_of(tmp_path / "run", "train.max_skipped=3", "train.steps=9", *settings)
    with pytest.raises(TrainingError, match=r"level 4, step 3: 3 steps in a row.*lower"):
        poisoned(trainer, value, range(9)).run(progress=False)
    again = trainer_of(tmp_path / "run", "train.max_skipped=3", "train.steps=9", resume=True)
    again.run(progress=False)  # with the cause removed it goes on
    assert again.finished


def test_trouble_that_ends_is_forgiven(tmp_path):
    trainer = trainer_of(tmp_path, "train.max_skipped=3", "train.steps=9")
    poisoned(trainer, math.nan, {0, 1, 3, 4, 6, 7}).run(progress=False)
    assert trainer.finished


@pytest.mark.slow  # CI runs these with the extra installed
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_sees_the_metrics(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra: pip install '.[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(tmp_path / "run", "train.tensorboard=true", level=4)
    events = EventAccumulator(str(run / "level-4")).Reload()
    logged = [event.value for event in events.Scalars("level-4/loss")]
    assert logged == pytest.approx([row["loss"] for row in metrics(run, 4)])
