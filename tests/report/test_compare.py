"""Runs beside each other, and the curves of their bits on test images."""

import shutil
from pathlib import Path

import pytest
from tiny import trained

from mrcnf import cli
from mrcnf.data.imagefile import read_image
from mrcnf.errors import UserError
from mrcnf.report import compare, plot
from mrcnf.runs import metrics as log


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


def test_runs_are_called_by_their_folders_unless_two_share_a_name(runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "a")
    assert compare.labels(runs) == ["a", "b"]
    assert compare.labels([runs[0], runs[0], runs[1]]) == ["a", "a", "b"]
    assert compare.labels([*runs, other]) == [str(runs[0]), "b", str(other)]
    text = compare.table(compare.compare([*runs, other]))
    assert text.count(f"| {runs[0]} |") == text.count(f"| {other} |") == text.count("| b |") == 2


def test_the_folder_one_stands_in_has_a_name(runs, monkeypatch):
    monkeypatch.chdir(runs[1])
    assert compare.labels([Path()]) == ["b"]
