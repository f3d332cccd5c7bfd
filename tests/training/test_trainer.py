"""Training steps: the same however they are divided, and of every objective."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny import images, metrics, trained
from trainers import command, same, trainer_of, weights

from mrcnf import runtime, seeds
from mrcnf.errors import TrainingError, UserError
from mrcnf.flows.solve import Solver, SolverError
from mrcnf.flows.trace import Trace
from mrcnf.measure import evaluate
from mrcnf.runs import config
from mrcnf.runs.images import open_images
from mrcnf.training import objectives
from mrcnf.training.trainer import Trainer


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trained(tmp_path / name, f"train.seed={seed}", level=4)
    a, b, c = (weights(tmp_path / name, 4) for name in "abc")
    assert same(a, b) and not same(a, c)


@pytest.mark.slow
def test_two_processes_are_two_micro_batches(recipe, tmp_path):
    short = ["train.micro_batches=2", "train.steps=20", "train.batch=8", "train.evaluate_every=10"]
    settings = config.load(recipe.path, short)
    test = open_images(settings.data, settings.model, "test")
    Trainer(settings, 4, recipe.data, tmp_path / "one", test=test).run(progress=False)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--standalone", *command(recipe.path, tmp_path / "two")[1:]]  # fmt: skip
    subprocess.run([*torchrun, "--level", "4", *short], check=True, timeout=240,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    one, two = weights(tmp_path / "one", 4), weights(tmp_path / "two", 4)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    curves = [
        [row["test_bpd"] for row in metrics(tmp_path / run, 4) if "test_bpd" in row]
        for run in ("one", "two")
    ]
    assert len(curves[0]) == 2 and curves[1] == pytest.approx(curves[0], rel=1e-4)
    longer = config.override(config.to_table(settings), ["train.steps=24"])
    for run in ("one", "two"):  # and one process goes on with what two have saved
        trainer = Trainer(
            config.from_table(longer), 4, recipe.data, tmp_path / run, resume=True
        )
        assert trainer.step_number == 20
        trainer.run(progress=False)
    one, two = weights(tmp_path / "one", 4), weights(tmp_path / "two", 4)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


def test_micro_batches_average_their_pieces(tmp_path):
    whole = trainer_of(tmp_path / "a", "train.micro_batches=2", "train.flip=false")
    whole.step()
    half = trainer_of(tmp_path / "b", "train.flip=false")
    gradients = []
    ((_, batch),) = half.batches.of_step(0)
    for piece, part in enumerate(batch.chunk(2)):
        seed = seeds.seed_of(0, 4, f"0/{piece}")
        loss, _ = half.objective(part, torch.Generator().manual_seed(seed))
        gradients.append(torch.autograd.grad(loss, half.update.parameters))
    scale = max(1.0, float(torch.nn.utils.get_total_norm(
        [(a + b) / 2 for a, b in zip(*gradients, strict=True)])))  # fmt: skip
    for parameter, a, b in zip(whole.update.parameters, *gradients, strict=True):
        torch.testing.assert_close(parameter.grad, (a + b) / 2 / scale)


def test_processes_and_micro_batches_must_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "rank_and_world", lambda: (0, 2))
    with pytest.raises(UserError, match="multiple of the 2 processes"):
        trainer_of(tmp_path, "train.micro_batches=1")


def test_a_failed_solve_is_a_skipped_step(tmp_path):
    adaptive = ("train.objective=likelihood", "train_solver.steps=0", "train_solver.method=bosh3")
    trainer = trainer_of(tmp_path / "run", *adaptive, "train.max_skipped=3", "train.steps=9")
    forward = trainer.objective.forward

    def failing(batch, generator):
        if trainer.step_number in (0, 2) or trainer.step_number >= 5:
            raise SolverError("level 4", "step underflow", 0.3, 1e-9, 99)
        return forward(batch, generator)

    trainer.objective.forward = failing
    with pytest.raises(TrainingError, match=r"3 steps in a row.*solver said: .*underflow"):
        trainer.run(progress=False)
    rows = metrics(tmp_path / "run", 4)
    assert [row["skipped"] for row in rows] == [1, 1, 2, 2, 2, 3, 4]
    failed = [math.isnan(row["loss"]) for row in rows]
    assert failed == [True, False, True, False, False, True, True]


def test_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="C\\+\\+ compiler"):
        trainer_of(tmp_path / "run", "train.compile=true")
    assert not (tmp_path / "run").exists()


def test_times_are_drawn_as_the_settings_say(tmp_path, monkeypatch):
    drawn, draw = [], objectives.draw_times
    monkeypatch.setattr(
        objectives, "draw_times", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1]
    )
    trainer_of(tmp_path, "train.times_centre=3", "train.times_spread=0.001").step()
    (times,) = drawn
    torch.testing.assert_close(times.logit(), torch.full_like(times, 3.0), rtol=0, atol=0.01)


OBJECTIVES = {
    "flow-matching": [],
    "likelihood": ["train.objective=likelihood"],
    "adjoint": ["train.objective=likelihood", "field.kind=paper", "train_solver.method=bosh3",
                "train.learning_rate=0.05",
                "train_solver.steps=0", "train_solver.gradient=adjoint",
                "train_solver.rtol=1e-2", "train_solver.atol=1e-2"],
    "gaussian": ["model.dequantisation=gaussian"],
    "lattice": ["model.dequantisation=gaussian", "field.lattice=true"],
    "variance-preserving": ["field.path=variance-preserving"],
    "integers": ["model.pyramid=integer"],
    "variational": ["model.dequantisation=variational"],
    "variational integers": ["model.pyramid=integer", "model.dequantisation=variational",
                             "train.times=likelihood"],
    "variational likelihood": ["model.pyramid=integer", "model.dequantisation=variational",
                               "train.objective=likelihood"],
    "gaussian likelihood": ["train.objective=likelihood", "model.dequantisation=gaussian"],
    "steered": ["train.objective=likelihood", "train.steer=0.2", "train.kinetic=0.1"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # and this one
@pytest.mark.parametrize(
    "flags",
    [
        ["field.attention=true"],
        ["field.attention=true", "field.scales=2"],
        OBJECTIVES["variational"],
        OBJECTIVES["likelihood"],
    ],
    ids=["flat", "u-shaped", "variational", "likelihood"],
)
def test_compiling_changes_no_more_than_rounding(tmp_path, flags):
    plain = trained(tmp_path / "plain", *flags, level=4)
    fast = trained(tmp_path / "fast", *flags, "train.compile=true", level=4)
    one, other = weights(plain, 4), weights(fast, 4)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-3)



def test_training_on_crops(tmp_path):
    for level in (2, 4, 8):
        trainer = trainer_of(
            tmp_path, "model.resolutions=[2,4,8]", "train.crop=4", level=level, data=images(side=8),
        )  # fmt: skip
        trainer.run(progress=False)
        assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path, level))


def test_bfloat16_trains_float32_weights(tmp_path):
    low = trainer_of(tmp_path / "low", "train.precision=bfloat16")
    high = trainer_of(tmp_path / "high")
    losses = [[float(t.step()["loss"]) for _ in range(3)][-1] for t in (low, high)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    low.run(progress=False)
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in low.update.parameters)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns(tmp_path, name):
    steps = 30 if "train.objective=likelihood" in OBJECTIVES[name] else 200
    settings = [f"train.steps={steps}", "train.learning_rate=0.02", "train.ema=0.9",
                "train.batch=12", "train.checkpoint_every=1000", "train.flip=false",
                *OBJECTIVES[name]]  # fmt: skip
    trainer = trainer_of(tmp_path / "run", *settings)
    trainer.level.trace, trainer.level.solver = Trace("exact"), Solver("rk4", steps=10)
    before = evaluate.level_bits(trainer.level.eval(), images().pixels)
    trainer.level.train()
    trainer.run(progress=False)
    losses = [row["loss"] for row in metrics(tmp_path / "run", 4)]
    assert sum(losses[-10:]) < sum(losses[:10])
    with trainer.update.averaged() as level:
        after = evaluate.level_bits(level, images().pixels)
    assert float((after - before).mean()) < -0.05


def test_a_matched_level_is_fine_tuned_by_likelihood(tmp_path):
    settings = ["train.steps=30", "train.learning_rate=0.01", "train.ema=0.9"]
    first = trained(tmp_path / "first", *settings, level=4)
    tune = [f"train.init={first}", "train.objective=likelihood", *settings]
    other = images(seed=7)  # whose standardisation differs: the weights bring their own along
    trainer = trainer_of(tmp_path / "second", *tune, data=other)
    assert same(dict(trainer.level.state_dict()), weights(first, 4))
    pairs = zip(trainer.update.average, trainer.update.parameters, strict=True)
    assert all(torch.equal(average, parameter) for average, parameter in pairs)
    trainer.run(progress=False)
    losses = [row["bpd"] for row in metrics(tmp_path / "second", 4)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert not same(weights(tmp_path / "second", 4), weights(first, 4))


@pytest.mark.parametrize(
    ("settings", "level", "words"),
    [
        (["field.width=6"], 4, "its field is"),
        (["model.nbits=4"], 4, "its nbits is 8, not 4"),
        (["model.base=logit"], 4, "its base is 'affine', not 'logit'"),
        (["model.resolutions=[4]"], 4, "its base level is False, not True"),
        ([], 2, "has no level 2"),
    ],
)
def test_unfit_starting_weights_are_refused(tmp_path, settings, level, words):
    first = trained(tmp_path / "first", "train.steps=1", level=4)
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path / "second", f"train.init={first}", *settings, level=level)
    assert not (tmp_path / "second").exists()
