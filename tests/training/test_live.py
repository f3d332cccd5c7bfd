"""What is seen of training: a bar in a terminal, lines elsewhere, samples, a user's loggers."""

import io
import re
import sys

import pytest
from tiny import TINY, files, images, metrics, tiny, trained, write_npz
from trainers import same, trainer_of, weights

import mrcnf
from mrcnf.data.imagefile import read_image
from mrcnf.errors import UserError
from mrcnf.training import live
from mrcnf.training.trainer import Trainer


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(data=write_npz(tmp_path / "data")))
    return path


def test_a_log_has_plain_lines_now_and_then(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(live, "LINE_EVERY", 0.0)
    curve = ["train.evaluate_every=2", "train.evaluate_images=4", "train.log_every=2"]
    mrcnf.train(config, level=4, out=tmp_path / "run", overrides=curve)
    said = capsys.readouterr().err
    assert said.isprintable() or not re.search(r"[^\n -~±]", said)
    first, last = said.splitlines()
    bits = r"test \d+\.\d{3} ± \d+\.\d{3} bits/dim"
    assert re.fullmatch(
        rf"level 4: 50%, step 2/4, loss \d+\.\d+, [\d,]+ images/s, {bits}, \d\d:\d\d left", first
    )
    assert re.fullmatch(rf"level 4: 100%, step 4/4, loss .*, {bits}, took \d\d:\d\d", last)


def test_a_log_of_a_short_run_has_one_line_a_level(config, tmp_path, capsys):
    mrcnf.train(config, out=tmp_path / "run")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in said] == ["level 2: 100%", "level 4: 100%"]
    mrcnf.train(config, out=tmp_path / "joint", joint=True)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("all levels: 100%, level 2: step 4/4, loss")
    mrcnf.train(config, out=tmp_path / "silent", progress=False)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_with_the_time_left(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = live.Live("level 4", True, 0.0)
    shown.bar.mininterval = 0
    with shown:
        shown.show(0.5, "step 2/4, loss 1.0, 9 images/s", True)
    assert "level 4:  50%" in sys.stderr.getvalue()
    assert re.search(r"\d\d:\d\d<.*, step 2/4, loss 1.0, 9 images/s", sys.stderr.getvalue())


def test_a_resumed_run_goes_on_saying_what_it_said(tmp_path):
    settings = ["train.evaluate_every=2", "train.evaluate_images=4"]
    first = trainer_of(tmp_path, *settings, test=images(seed=1))
    for _ in range(2):
        first.advance()
    first.save()
    again = trainer_of(tmp_path, *settings, test=images(seed=1), resume=True)
    again.begin()
    assert again.said() == first.said() and "bits/dim" in again.said()


def test_samples_change_nothing_else(tmp_path):
    plain = trained(tmp_path / "plain")
    drawn = trained(tmp_path / "drawn", "train.sample_every=2")
    for level in (2, 4):
        assert same(weights(plain, level), weights(drawn, level))
        assert metrics(plain, level) == metrics(drawn, level)
        names = [p.name for p in sorted((drawn / f"level-{level}").glob("*.png"))]
        assert names == ["samples-000002.png", "samples-000004.png"]
    assert not list(plain.rglob("*.png"))
    side = 3 * 66 + 2  # 12 images as a square of 4 columns
    assert read_image(drawn / "level-2/samples-000002.png").shape == (1, side, side + 66)


def test_samples_are_of_the_same_noise_and_go_on_when_resumed(tmp_path):
    whole = trained(tmp_path / "whole", "train.sample_every=1", level=4)
    first = trainer_of(tmp_path / "run", "train.sample_every=1")
    for _ in range(3):
        first.advance()  # the checkpoint is of step 2
    trainer_of(tmp_path / "run", "train.sample_every=1", resume=True).run(progress=False)
    pictures = {name: data for name, data in files(whole).items() if name.suffix == ".png"}
    again = {name: data for name, data in files(tmp_path / "run").items() if name.suffix == ".png"}
    assert len(pictures) == 4 and again == pictures
    resting = ["train.sample_every=1", "train.learning_rate=1e-30"]
    still = trained(tmp_path / "still", *resting, level=4)
    assert len({data for name, data in files(still).items() if name.suffix == ".png"}) == 1


def test_samples_of_a_finer_level_are_drawn_upon_coarse_images(tmp_path):
    data = images(count=5)
    trainer = Trainer(tiny("train.sample_every=4"), 4, data, tmp_path)
    trainer.run(progress=False)
    picture = read_image(tmp_path / "level-4/samples-000004.png")
    assert picture.shape == (1, 2 * 66 + 2, 12 * 66 + 2)
    coarse, truth = picture[:, 2:66, 2:66], picture[:, 2:66, 134:198]
    shown = truth[:, ::16, ::16]
    assert any((shown == image).all() for image in data.pixels)
    means = shown.double().reshape(1, 2, 2, 2, 2).mean((2, 4))
    assert (coarse[:, ::32, ::32].double() - means).abs().max() <= 1


class Notes:
    def __init__(self):
        self.rows = []

    def log(self, values, step):
        self.rows.append((step, values))


def test_loggers_are_told_every_line(config, tmp_path):
    one, other = Notes(), Notes()
    run = mrcnf.train(config, out=tmp_path / "run", logger=[one, other], progress=False)
    assert one.rows == other.rows
    for level in (2, 4):
        name = f"level-{level}/"
        told = [
            {"step": step} | {key.removeprefix(name): value for key, value in values.items()}
            for step, values in one.rows if all(key.startswith(name) for key in values)
        ]  # fmt: skip
        for row in told:
            del row["seconds"], row["images_per_s"]
        assert told == metrics(run, level) and len(told) == 4
    alone = Notes()
    mrcnf.train(config, level=2, out=tmp_path / "alone", logger=alone, progress=False)
    assert len(alone.rows) == 4


class Narrow:
    def log(self, values):
        pass


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        (print, r"logger builtin_function_or_method has no method log\(dict, step\)"),
        ([Notes(), 3], r"logger int has no method log"),
        (Narrow(), r"logger Narrow: log takes \(values\), and is called with \(dict, 0\)"),
    ],
)
def test_a_logger_that_does_not_fit_is_refused_before_anything(config, tmp_path, logger, message):
    with pytest.raises(UserError, match=message):
        mrcnf.train(config, out=tmp_path / "run", logger=logger)
    assert not (tmp_path / "run").exists()
