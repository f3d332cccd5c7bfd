"""Runs beside each other, and the curves of their bits on test images."""

import pytest
import torch
from runs import images, tiny, trained

from mrcnf.cli import commands as cli
from mrcnf.data.imagefile import read_image
from mrcnf.errors import UserError
from mrcnf.report import compare, plot
from mrcnf.runs import metrics as log
from mrcnf.training import trainer as train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, override in (("a", "train.beta2=0.99"), ("b", "train.beta2=0.5")):
        settings = tiny(override, "train.evaluate_every=2")
        for level in (2, 4):
            trainer = train.Trainer(settings, level, images(), folder / name, test=images(seed=1))
            trainer.run(progress=False)
    return [folder / "a", folder / "b"]


def test_rows_say_what_differs_and_what_it_gave(runs):
    rows = compare.compare(runs)
    assert [(row.run.name, row.resolution) for row in rows] == [
        ("a", 2), ("b", 2), ("a", 4), ("b", 4),
    ]  # fmt: skip
    assert [row.settings for row in rows] == [{}, {"train.beta2": 0.5}] * 2
    last = log.read_curve(runs[1] / "level-4")[-1]
    assert (rows[3].bpd, rows[3].bpd_stderr) == (last["test_bpd"], last["test_bpd_stderr"])
    assert {row.step for row in rows} == {4} and all(row.minutes > 0 for row in rows)
    text = compare.table(rows)
    assert f"| b | 4 | {rows[3].parameters:,} | 4 |" in text and "train.beta2 = 0.5 |" in text


def test_the_command_prints_the_table_and_draws_the_curves(runs, tmp_path, capsys):
    cli.main(["compare", *map(str, runs), "--out", str(tmp_path / "curves.png")])
    assert capsys.readouterr().out.strip() == compare.table(compare.compare(runs))
    assert read_image(tmp_path / "curves.png").float().std() > 1


def test_runs_without_a_curve_are_still_compared(tmp_path):
    trained(tmp_path / "plain", level=4)
    (row,) = compare.compare([tmp_path / "plain"])
    assert row.bpd is None
    with pytest.raises(UserError, match="evaluate_every"):
        plot.bpd_curves(tmp_path / "curves.png", [tmp_path / "plain"])
    assert not (tmp_path / "curves.png").exists()


def test_the_loss_curve_passes_over_the_test_rows(runs, tmp_path):
    plot.training_curves(tmp_path / "loss.png", runs[0])
    assert read_image(tmp_path / "loss.png").dtype == torch.uint8


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path):
    trained(tmp_path / "run", level=4)
    log_file = tmp_path / "run/level-4/metrics.jsonl"
    whole = log.read(tmp_path / "run/level-4")
    log_file.write_text(log_file.read_text() + '{"step": 5, "lo')
    assert log.read(tmp_path / "run/level-4") == whole


def test_a_missing_configuration_is_named(tmp_path):
    trained(tmp_path / "run", level=4)
    (tmp_path / "run/level-4/config.toml").unlink()
    with pytest.raises(UserError, match=r"level-4/config\.toml"):
        compare.compare([tmp_path / "run"])
    with pytest.raises(UserError, match="at least one"):
        compare.compare([])
