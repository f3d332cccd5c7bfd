"""What a user was promised of a run that is killed, stopped, resumed or out of room."""

import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from tiny import files, images, metrics, trained
from trainers import command, resumed_equals_whole, same, start, trainer_of, wait_for, weights

from mrcnf.errors import UserError
from mrcnf.runs import checkpoint
from mrcnf.training import resume


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
    write, save_level = resume.write_tensors, checkpoint.save_level

    def dying(path, *rest):
        due = killed.step_number == step
        if due and moment == "between renames" and path.name == checkpoint.STATE:
            raise SystemExit
        if due and moment == "before weights":
            raise SystemExit
        write(path, *rest)
        if due and moment == "between" and path.name == checkpoint.WEIGHTS:
            raise SystemExit

    for module in (resume, checkpoint):
        monkeypatch.setattr(module, "write_tensors", dying)
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


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
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
    trained(run, "train.steps=5", level=4, resume=True)
    assert log.read_text().startswith(whole)
    assert [row["step"] for row in metrics(run, 4)] == [1, 2, 3, 4, 5]


def test_resuming_what_is_finished_changes_nothing(tmp_path):
    """Not even the record of how it was trained."""
    run = trained(tmp_path / "run", level=4)
    before = files(run)
    trained(run, "train.learning_rate=1.0", "train.steps=3", level=4, resume=True)
    assert files(run) == before


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


def test_a_fine_tuned_run_resumes_without_its_origin(tmp_path):
    first = trained(tmp_path / "first", level=4)
    tune = [f"train.init={first}", "train.steps=6"]
    trained(tmp_path / "whole", *tune, level=4)
    after_three = iter([False] * 3 + [True]).__next__
    trainer_of(tmp_path / "part", *tune).run(progress=False, stop=after_three)
    shutil.rmtree(first)
    trained(tmp_path / "part", *tune, level=4, resume=True)
    assert same(weights(tmp_path / "part", 4), weights(tmp_path / "whole", 4))


def test_a_folder_in_use_is_left_alone(tmp_path):
    run = trained(tmp_path / "run", level=4)
    before = files(run)
    with pytest.raises(UserError, match="add --resume"):
        trainer_of(run)
    assert files(run) == before
