"""Training: what a user was promised of a run, killed, divided, resumed or gone wrong."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from runs import TINY, files, images, metrics, tiny, trained, write_npz

from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver, SolverError
from mrcnf.flows.trace import Trace
from mrcnf.measure import evaluate
from mrcnf.runs import checkpoint, config
from mrcnf.training import objectives
from mrcnf.training import trainer as train


def weights(run, level):
    return checkpoint.read_tensors(run / f"level-{level}" / checkpoint.WEIGHTS)[0]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def trainer_of(run, *overrides, level=4, data=None, resume=False):
    return train.Trainer(tiny(*overrides), level, data or images(), run, resume)


def command(path, run, *arguments):
    """`mrcnf train` in a process of its own."""
    return [sys.executable, "-m", "mrcnf", "train", str(path), "--out", str(run), *arguments]


def start(arguments):
    # One thread, as in this process: sums are rounded by the number of threads.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=one_thread
    )


@pytest.fixture
def recipe(tmp_path):
    """A configuration file of level 4 with 300 steps, its data, and its undisturbed run."""
    text = TINY.format(data=write_npz(tmp_path / "data"))
    text = text.replace("steps = 4\n", "steps = 300\n").replace("_every = 2", "_every = 15")
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    settings = config.load(path)
    data = train.load_images(settings.data, settings.model, "train")
    train.Trainer(settings, 4, data, tmp_path / "whole").run(progress=False)
    return SimpleNamespace(path=path, whole=tmp_path / "whole", settings=settings, data=data)


def resumed_equals_whole(recipe, run):
    train.Trainer(recipe.settings, 4, recipe.data, run, resume=True).run(progress=False)
    assert metrics(run, 4) == metrics(recipe.whole, 4)
    assert same(weights(run, 4), weights(recipe.whole, 4))


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Interrupted and resumed


def test_a_killed_run_resumes_to_the_same_weights(recipe, tmp_path):
    run = tmp_path / "killed"
    log = run / "level-4" / "metrics.jsonl"
    with start(command(recipe.path, run, "--level", "4")) as process:
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 20, process)
        process.kill()
    assert 20 < len(metrics(run, 4)) < 300
    resumed_equals_whole(recipe, run)


@pytest.mark.parametrize("moment", ["before weights", "between", "between renames"])
@pytest.mark.parametrize("step", [2, 4])
def test_a_kill_while_a_checkpoint_is_written(tmp_path, monkeypatch, moment, step):
    trained(tmp_path / "whole", level=4)
    killed = trainer_of(tmp_path / "killed")
    write, save_level = checkpoint.write_tensors, checkpoint.save_level

    def dying(path, *rest):
        due = killed.step_number == step
        if due and moment == "between renames" and path.name == checkpoint.STATE:
            raise SystemExit
        if due and moment == "before weights":
            raise SystemExit
        write(path, *rest)
        if due and moment == "between" and path.name == checkpoint.WEIGHTS:
            raise SystemExit

    monkeypatch.setattr(checkpoint, "write_tensors", dying)
    with pytest.raises(SystemExit):
        killed.run(progress=False)
    monkeypatch.undo()
    assert save_level is checkpoint.save_level
    trained(tmp_path / "killed", level=4, resume=True)
    assert same(weights(tmp_path / "killed", 4), weights(tmp_path / "whole", 4))
    assert metrics(tmp_path / "killed", 4) == metrics(tmp_path / "whole", 4)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(recipe, tmp_path):
    run, kills, moments = tmp_path / "killed", 0, random.Random(0)
    log = run / "level-4" / "metrics.jsonl"
    finished = False
    while not finished:
        with start(command(recipe.path, run, "--level", "4", "--resume")) as process:
            before = log.stat().st_size if log.exists() else -1
            while process.poll() is None and (not log.exists() or log.stat().st_size == before):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.35))
            if kills == 12:  # enough: the last one may finish
                process.wait()
            finished = process.poll() is not None
            process.kill()
            kills += not finished
    assert kills >= 3 and process.returncode == 0
    resumed_equals_whole(recipe, run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint(recipe, tmp_path, number):
    run = tmp_path / "stopped"
    log = run / "level-4" / "metrics.jsonl"
    endless = "train.checkpoint_every=100000"
    with start(command(recipe.path, run, "--level", "4", endless)) as process:
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 20, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.decode().rstrip().endswith("mrcnf: interrupted")
    stopped_at = checkpoint.describe(run)[4]["step"]
    assert stopped_at == len(metrics(run, 4)) > 20
    resumed_equals_whole(recipe, run)


def test_a_run_stopped_before_its_first_step_goes_on(tmp_path):
    trainer_of(tmp_path / "stopped").run(progress=False, stop=lambda: True)
    trained(tmp_path / "stopped", level=4, resume=True)
    trained(tmp_path / "whole", level=4)
    assert same(weights(tmp_path / "stopped", 4), weights(tmp_path / "whole", 4))


def test_out_of_memory_keeps_the_state(tmp_path):
    trainer = trainer_of(tmp_path / "run", "train.checkpoint_every=100")
    forward = trainer.objective.forward

    def greedy(*arguments):
        if trainer.step_number == 3:
            torch.empty(2**60, dtype=torch.uint8)
        return forward(*arguments)

    trainer.objective.forward = greedy
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        trainer.run(progress=False)
    resumed = trainer_of(tmp_path / "run", "train.checkpoint_every=100", resume=True)
    assert resumed.step_number == 3
    resumed.run(progress=False)
    assert same(weights(tmp_path / "run", 4), weights(trained(tmp_path / "whole", level=4), 4))


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(recipe, tmp_path):
    """A limit on the size of files stands in for a full disk: writes fail half way."""
    arguments = command(recipe.path, tmp_path / "run", "--level", "4")
    run = start(arguments)
    state = tmp_path / "run/level-4" / checkpoint.STATE
    wait_for(state.exists, run)
    run.terminate()
    run.communicate()
    before = state.read_bytes()
    limit = len(before) // 2
    full = ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "-", *arguments, "--resume"]
    failed = subprocess.run(full, capture_output=True, text=True)
    assert failed.returncode == 2 and "File too large" in failed.stderr.splitlines()[-1]
    after = files(tmp_path / "run")
    assert before in after.values() and not any("tmp" in str(name) for name in after)
    resumed_equals_whole(recipe, tmp_path / "run")


def test_resuming_a_finished_run_changes_no_weights(tmp_path):
    run = trained(tmp_path / "run")
    before = files(run)
    trained(run, resume=True)
    assert files(run) == before


def test_a_log_line_cut_short_is_dropped(tmp_path):
    run = trained(tmp_path / "run", level=4)
    log = run / "level-4" / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 5, "lo')
    trained(run, level=4, resume=True)
    assert log.read_text() == whole


# Divided among folders, levels and processes


@pytest.mark.parametrize("joint", [True, False])
def test_levels_do_not_depend_on_each_other(tmp_path, joint):
    data = write_npz(tmp_path / "data")
    settings = tiny(f"data.name={data}", "level.4.train.steps=7")
    train.train_levels(settings, [2, 4], tmp_path / "run", joint=joint, progress=False)
    chosen = train.load_images(settings.data, settings.model, "train")
    for level in (2, 4):
        alone = tmp_path / f"alone-{level}"
        train.Trainer(settings, level, chosen, alone).run(progress=False)
        assert same(weights(tmp_path / "run", level), weights(alone, level))
        assert metrics(tmp_path / "run", level) == metrics(alone, level)


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trained(tmp_path / name, f"train.seed={seed}", level=4)
    a, b, c = (weights(tmp_path / name, 4) for name in "abc")
    assert same(a, b) and not same(a, c)


def test_the_curve_on_test_images_changes_nothing_else(tmp_path):
    settings, data = tiny("train.evaluate_every=2", "train.evaluate_images=5"), images(seed=1)
    trainer = train.Trainer(settings, 4, images(), tmp_path / "run", test=data)
    trainer.run(progress=False)
    rows = metrics(tmp_path / "run", 4)
    curve = {row["step"]: row["test_bpd"] for row in rows if "test_bpd" in row}
    assert list(curve) == [2, 4]
    bits = evaluate.level_bits(trainer.finished_level(), data.pixels[:5])
    assert curve[4] == pytest.approx(float(bits.mean()), rel=1e-6)
    plain = trained(tmp_path / "plain", level=4)
    assert same(weights(tmp_path / "run", 4), weights(plain, 4))
    assert [row for row in rows if "loss" in row] == metrics(plain, 4)


def test_a_failed_solve_on_test_images_decides_nothing(tmp_path):
    settings = tiny("train.evaluate_every=2", "solver.steps=0", "solver.method=dopri5",
                    "solver.max_evaluations=2")  # fmt: skip
    trainer = train.Trainer(settings, 4, images(), tmp_path / "run", test=images(seed=1))
    trainer.run(progress=False)
    failed = [row["step"] for row in metrics(tmp_path / "run", 4) if "test_failed" in row]
    assert failed == [2, 4]
    assert same(weights(tmp_path / "run", 4), weights(trained(tmp_path / "plain", level=4), 4))


@pytest.mark.slow
def test_two_processes_are_two_micro_batches(recipe, tmp_path):
    short = ["train.micro_batches=2", "train.steps=20", "train.batch=8", "train.evaluate_every=10"]
    settings = config.load(recipe.path, short)
    test = train.load_images(settings.data, settings.model, "test")
    train.Trainer(settings, 4, recipe.data, tmp_path / "one", test=test).run(progress=False)
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
        trainer = train.Trainer(
            config.from_table(longer), 4, recipe.data, tmp_path / run, resume=True
        )
        assert trainer.step_number == 20
        trainer.run(progress=False)
    one, two = weights(tmp_path / "one", 4), weights(tmp_path / "two", 4)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(recipe, tmp_path):
    """Every batch has seeds of its own, so the numbers are the same whoever takes it."""
    settings = config.load(recipe.path, ["train.steps=3"])
    for level in (2, 4):
        train.Trainer(settings, level, recipe.data, tmp_path / "run").run(progress=False)
    words = ["evaluate", str(tmp_path / "run"), "--device", "cpu", "--batch", "5", "--json"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    tables = []
    for name, launcher in (
        ("one", ["-m", "mrcnf"]),
        ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                 "-m", "mrcnf"]),
    ):  # fmt: skip
        path = tmp_path / f"{name}.json"
        said = subprocess.run(
            [sys.executable, *launcher, *words, str(path)],
            check=True, timeout=240, env=one_thread, capture_output=True, text=True,
        )  # fmt: skip
        assert said.stdout.count("bits/dim on") == 1
        tables.append(json.loads(path.read_text()))
    for table in tables:
        del table["seconds"]
    assert tables[0] == tables[1]


def test_micro_batches_average_their_pieces(tmp_path):
    whole = trainer_of(tmp_path / "a", "train.micro_batches=2", "train.flip=false")
    whole.step()
    half = trainer_of(tmp_path / "b", "train.flip=false")
    gradients = []
    for piece, indices in enumerate(half.order.indices(0).chunk(2)):
        seed = train.seed_of(0, 4, f"0/{piece}")
        loss, _ = half.objective(half.images[indices], torch.Generator().manual_seed(seed))
        gradients.append(torch.autograd.grad(loss, half.parameters))
    scale = max(1.0, float(torch.nn.utils.get_total_norm(
        [(a + b) / 2 for a, b in zip(*gradients, strict=True)])))  # fmt: skip
    for parameter, a, b in zip(whole.parameters, *gradients, strict=True):
        torch.testing.assert_close(parameter.grad, (a + b) / 2 / scale)


def test_processes_and_micro_batches_must_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(train.runtime, "rank_and_world", lambda: (0, 2))
    with pytest.raises(UserError, match="multiple of the 2 processes"):
        trainer_of(tmp_path, "train.micro_batches=1")


# Gone wrong


def poisoned(trainer, value, steps):
    """Let the loss of certain steps have gradients of this value."""
    forward = trainer.objective.forward

    def wrapped(batch, generator):
        loss, parts = forward(batch, generator)
        factor = value if trainer.step_number in steps else 1.0
        return loss * torch.tensor(factor), parts

    trainer.objective.forward = wrapped
    return trainer


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_bad_step_is_skipped_and_counted(tmp_path, value, optimizer):
    trainer = trainer_of(tmp_path / "run", f"train.optimizer={optimizer}")
    trainer = poisoned(trainer, value, {1, 2})
    history = [[p.detach().clone() for p in trainer.parameters]]
    moments = []
    for _ in range(4):
        trainer.advance()
        history.append([p.detach().clone() for p in trainer.parameters])
        moments.append({k: v.clone() for k, v in trainer.optimizer.state_dict().items()})
    changed = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in pairwise(history)
    ]
    assert changed == [True, False, False, True]
    assert same(moments[0], moments[2]) and not same(moments[2], moments[3])
    assert any(name.startswith("muon") for name in moments[0]) == (optimizer == "muon")
    assert [row["skipped"] for row in metrics(tmp_path / "run", 4)] == [0, 1, 2, 2]
    assert all(p.isfinite().all() for p in weights(tmp_path / "run", 4).values())


def test_a_failed_solve_is_a_skipped_step(tmp_path):
    adaptive = ("train.objective=likelihood", "train_solver.steps=0", "train_solver.method=bosh3")
    trainer = trainer_of(tmp_path / "run", *adaptive, "train.max_skipped=3", "train.steps=9")
    forward = trainer.objective.forward

    def failing(batch, generator):
        if trainer.step_number in (0, 2) or trainer.step_number >= 5:
            raise SolverError("level 4", "step underflow", 0.3, 1e-9, 99)
        return forward(batch, generator)

    trainer.objective.forward = failing
    with pytest.raises(train.TrainingError, match=r"3 steps in a row.*solver said: .*underflow"):
        trainer.run(progress=False)
    rows = metrics(tmp_path / "run", 4)
    assert [row["skipped"] for row in rows] == [1, 1, 2, 2, 2, 3, 4]
    failed = [math.isnan(row["loss"]) for row in rows]
    assert failed == [True, False, True, False, False, True, True]


@pytest.mark.parametrize(
    ("settings", "value"), [((), math.nan), (("train.skip_above=1e-9",), 1.0)]
)
def test_persistent_trouble_ends_with_advice(tmp_path, settings, value):
    trainer = trainer_of(tmp_path / "run", "train.max_skipped=3", "train.steps=9", *settings)
    with pytest.raises(train.TrainingError, match=r"level 4, step 3: 3 steps in a row.*lower"):
        poisoned(trainer, value, range(9)).run(progress=False)
    again = trainer_of(tmp_path / "run", "train.max_skipped=3", "train.steps=9", resume=True)
    again.run(progress=False)  # with the cause removed it goes on
    assert again.finished


def test_trouble_that_ends_is_forgiven(tmp_path):
    trainer = trainer_of(tmp_path, "train.max_skipped=3", "train.steps=9")
    poisoned(trainer, math.nan, {0, 1, 3, 4, 6, 7}).run(progress=False)
    assert trainer.finished


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Images(torch.rand(9, 1, 4, 4), "floats", "train"), "uint8"),
        (images(channels=3), r"3 channel\(s\) but model.channels is 1"),
        (images(side=8), "8×8 but the finest of model.resolutions is 4"),
    ],
)
def test_unfit_images_are_refused_and_nothing_is_written(tmp_path, data, words):
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path / "run", "model.channels=1", data=data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "data", "words"),
    [
        (["field.width=6"], images(), r"checkpoint of another model: its \[field\]"),
        (["model.nbits=4"], images(), r"checkpoint of another model: its \[model\]"),
        ([], images(seed=5), "other images"),
    ],
)
def test_another_model_or_data_is_not_resumed(tmp_path, settings, data, words):
    run = trained(tmp_path / "run", level=4)
    before = files(run)
    with pytest.raises(UserError, match=words):
        trainer_of(run, *settings, data=data, resume=True)
    assert files(run) == before


def test_a_folder_in_use_is_left_alone(tmp_path):
    run = trained(tmp_path / "run", level=4)
    before = files(run)
    with pytest.raises(UserError, match="add --resume"):
        trainer_of(run)
    with pytest.raises(UserError, match=r"level-4.*add --resume"):  # before level 2 is begun
        train.train_levels(tiny("data.name=photos"), [2, 4], run)
    assert files(run) == before


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.crop=3", "crop 3 must be a multiple of 2"),
        ("train.crop=6", "at most 4"),
        ("field.blocks=2", "flow matching trains one field"),
        ("train.device=gpu", "unknown device 'gpu'"),
        ("train.init=nowhere", "no run folder nowhere"),
    ],
)
def test_unfit_settings_are_refused_and_nothing_is_written(tmp_path, setting, words):
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path / "run", setting)
    assert not (tmp_path / "run").exists()


# The recipe


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
    ],
    ids=["flat", "u-shaped", "variational"],
)
def test_compiling_changes_no_more_than_rounding(tmp_path, flags):
    plain = trained(tmp_path / "plain", *flags, level=4)
    fast = trained(tmp_path / "fast", *flags, "train.compile=true", level=4)
    one, other = weights(plain, 4), weights(fast, 4)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_rises_then_follows_its_schedule(tmp_path, schedule):
    trainer = trainer_of(
        tmp_path, f"train.schedule={schedule}", "train.warmup=10", "train.steps=100",
        "train.learning_rate=0.5",
    )  # fmt: skip
    rates = []
    for trainer.step_number in range(101):
        rates.append(trainer.schedule.learning_rate(trainer.step_number, 0.0))
    falling = [(1 + math.cos(math.pi * k / 100)) / 2 for k in range(101)]
    fall = falling if schedule == "cosine" else [1] * 101
    expected = [0.5 * min(1, (k + 1) / 10) * fall[k] for k in range(101)]
    assert rates == pytest.approx(expected)


def test_the_average_follows_the_weights(tmp_path):
    trainer = trainer_of(tmp_path, "train.ema=0.3", "train.steps=6")
    average = [p.detach().clone() for p in trainer.parameters]
    for k in range(6):
        trainer.step()
        decay = min(0.3, (1 + k) / (10 + k))
        average = [decay * a + (1 - decay) * p.detach()
                   for a, p in zip(average, trainer.parameters, strict=True)]  # fmt: skip
    for kept, expected in zip(trainer.average, average, strict=True):
        torch.testing.assert_close(kept, expected)
    finished = dict(trainer.finished_level().named_parameters())
    for (name, raw), kept in zip(
        trainer.level.named_parameters(), trainer.average, strict=True
    ):
        assert torch.equal(finished[name], kept) and not torch.equal(finished[name], raw)


def test_without_averaging_the_last_weights_are_saved(tmp_path):
    trainer = trainer_of(tmp_path / "run", "train.ema=0")
    trainer.run(progress=False)
    assert same(weights(tmp_path / "run", 4), trainer.level.state_dict())


@pytest.mark.parametrize("batch", [3, 4, 5, 12, 31])
def test_each_epoch_visits_every_image_once(tmp_path, batch):
    trainer, seen = trainer_of(tmp_path, f"train.batch={batch}"), []
    for trainer.step_number in range(3 * 12):
        indices = trainer.order.indices(trainer.step_number)
        assert len(indices) == batch
        seen += indices.tolist()
    epochs = [seen[i : i + 12] for i in range(0, 3 * 12 * batch, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    trainer.step_number, trainer.epoch = 7, -1  # as after resuming
    assert trainer.order.indices(trainer.step_number).tolist() == seen[7 * batch : 8 * batch]


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("crop", [0, 4, 8])
def test_crops_are_windows_of_the_images(flip, crop):
    pixels = torch.arange(6 * 64, dtype=torch.int32).reshape(6, 1, 8, 8)
    seen = set()
    for seed in range(20):
        cut = objectives.augment(pixels, flip, crop, torch.Generator().manual_seed(seed))
        side = crop or 8
        assert cut.shape == (6, 1, side, side)
        for original, image in zip(pixels, cut, strict=True):
            corner = int(image.min()) - int(original.min())
            top, left = divmod(corner, 8)
            window = original[:, top : top + side, left : left + side]
            mirrored = not torch.equal(image, window)
            assert not mirrored or (flip and torch.equal(image, window.flip(-1)))
            seen.add((top, left, mirrored))
    assert {mirrored for *_, mirrored in seen} == ({True, False} if flip else {False})
    places = {place[:2] for place in seen}
    assert len(places) > 5 if crop == 4 else places == {(0, 0)}


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
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in low.parameters)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns(tmp_path, name):
    steps = 30 if "train.objective=likelihood" in OBJECTIVES[name] else 200
    settings = [f"train.steps={steps}", "train.learning_rate=0.02", "train.ema=0.9",
                "train.batch=12", "train.checkpoint_every=1000", "train.flip=false",
                *OBJECTIVES[name]]  # fmt: skip
    trainer = trainer_of(tmp_path / "run", *settings)
    exact = {"trace": Trace("exact"), "solver": Solver("rk4", steps=10)}
    before = evaluate.level_bits(trainer.level.eval(), images().pixels, **exact)
    trainer.level.train()
    trainer.run(progress=False)
    losses = [row["loss"] for row in metrics(tmp_path / "run", 4)]
    assert sum(losses[-10:]) < sum(losses[:10])
    after = evaluate.level_bits(trainer.finished_level(), images().pixels, **exact)
    assert float((after - before).mean()) < -0.05


# Starting from another run's weights


def test_a_matched_level_is_fine_tuned_by_likelihood(tmp_path):
    settings = ["train.steps=30", "train.learning_rate=0.01", "train.ema=0.9"]
    first = trained(tmp_path / "first", *settings, level=4)
    tune = [f"train.init={first}", "train.objective=likelihood", *settings]
    other = images(seed=7)  # whose standardisation differs: the weights bring their own along
    trainer = trainer_of(tmp_path / "second", *tune, data=other)
    assert same(dict(trainer.level.state_dict()), weights(first, 4))
    assert all(torch.equal(a, p) for a, p in zip(trainer.average, trainer.parameters, strict=True))
    trainer.run(progress=False)
    losses = [row["bpd"] for row in metrics(tmp_path / "second", 4)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert not same(weights(tmp_path / "second", 4), weights(first, 4))


def test_a_fine_tuned_run_resumes_without_its_origin(tmp_path):
    first = trained(tmp_path / "first", level=4)
    tune = [f"train.init={first}", "train.steps=6"]
    trained(tmp_path / "whole", *tune, level=4)
    after_three = iter([False] * 3 + [True]).__next__
    trainer_of(tmp_path / "part", *tune).run(progress=False, stop=after_three)
    shutil.rmtree(first)
    trained(tmp_path / "part", *tune, level=4, resume=True)
    assert same(weights(tmp_path / "part", 4), weights(tmp_path / "whole", 4))


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


def test_the_log_says_what_was_done(tmp_path):
    run = trained(tmp_path / "run", "train.log_every=3", "train.steps=7", level=4)
    lines = (run / "level-4" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [3, 6, 7]
    for row in rows:
        assert row["images_per_s"] > 0 and row["seconds"] > 0 and row["gradient_norm"] > 0


@pytest.mark.slow  # CI runs these with the extra installed
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_sees_the_metrics(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra: pip install '.[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(tmp_path / "run", "train.tensorboard=true", level=4)
    events = EventAccumulator(str(run / "level-4")).Reload()
    logged = [event.value for event in events.Scalars("level-4/loss")]
    assert logged == pytest.approx([row["loss"] for row in metrics(run, 4)])
