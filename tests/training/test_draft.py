"""A first configuration: it fits the images, and what it says of them and of time is so."""

import itertools

import numpy as np
import pytest
import torch
from tiny import smooth_images, write_npz

from mrcnf.data.imagefile import save_image
from mrcnf.errors import UserError
from mrcnf.runs import config
from mrcnf.runs.settings import DataConfig
from mrcnf.training import draft as drafting
from mrcnf.training.draft import draft


@pytest.fixture
def paced(monkeypatch):
    """A machine on which steps of levels take what a test says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pace = {2: 0.1, 4: 0.1, 8: 0.2, 16: 0.4, 32: 0.8}
    monkeypatch.setattr(
        drafting, "_pace", lambda c, images: {r: pace[r] for r in c.model.resolutions}
    )


def write_photographs(folder, sizes):
    for i, (height, width) in enumerate(sizes):
        side = max(height, width)
        image = smooth_images(1, channels=3, side=side, seed=i)[0, :, :height, :width]
        save_image(folder / f"{i}.png", image)
    return f"folder:{folder}"


def test_what_it_writes_is_what_it_says(tmp_path, paced):
    name = write_photographs(tmp_path, [(40 + i, 70 - 3 * i) for i in range(9)])
    found = draft("mine", DataConfig(name=name), minutes=30.0)
    again = config.from_table(config.tomllib.loads(found.text))
    assert again == found.config and again.name == "mine"
    assert again.model.resolutions == (8, 16) and again.data.crop > 1
    assert "9 photographs of 46×48 to 70×40: " in found.images
    assert "from 8 photographs to train on" in found.images and found.images in found.text
    steps = {r: again.at_level(r).train.steps for r in again.model.resolutions}
    seconds = sum(n * found.seconds[r] for r, n in steps.items())
    assert found.minutes == pytest.approx(seconds / 60)
    assert found.minutes <= 30
    shorter = draft("mine", DataConfig(name=name), minutes=2.0)
    assert shorter.minutes == pytest.approx(2, rel=0.05)


def test_little_data_is_not_seen_for_ever(tmp_path, paced):
    name = write_npz(tmp_path / "data", side=8, count=12)
    found = draft("n", DataConfig(name=name), (4, 8), minutes=1e6)
    for r in (4, 8):
        train = found.config.at_level(r).train
        assert train.steps * train.batch <= drafting.EPOCHS * 12
    assert found.config.data.crop == 0 and found.config.train.batch <= 12


@pytest.mark.parametrize(
    ("smallest", "expected"), [(64, (8, 16, 32)), (63, (8, 16)), (16, (4, 8)), (8, (2, 4))]
)
def test_the_finest_level_fits_the_smallest_photograph(tmp_path, paced, smallest, expected):
    name = write_photographs(tmp_path, [(64, 64)] * 2 + [(smallest, 70)])
    found = draft("n", DataConfig(name=name))
    assert found.config.model.resolutions == expected


def test_a_file_has_its_resolution(tmp_path, paced):
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}.npy", smooth_images(side=16).numpy())
    found = draft("n", DataConfig(name=f"npy:{tmp_path}"))
    assert found.config.model.resolutions == (8, 16) and found.config.data.crop == 0


def test_settings_of_data_are_kept(tmp_path, paced):
    data = DataConfig(name=write_npz(tmp_path / 'a "b"', side=4), root="r", limit=7, download=True)
    assert draft("n", data, (2, 4)).config.data == data


@pytest.mark.parametrize(
    ("sizes", "how", "words"),
    [
        ([(40, 40)], {}, "holds one photograph"),
        ([(40, 40)] * 4 + [(3, 9)], {}, "smallest photograph has a side of less than 8"),
        ([(32, 32)] * 4, {"resolutions": (32,)}, "at least 2 of either are needed"),
        ([(40, 40)] * 4, {"resolutions": (32, 64)}, "40×40 is smaller than the resolution 64"),
        ([(40, 40)] * 4, {"resolutions": (8, 32)}, "each level must be twice the one before"),
        ([(40, 40)] * 4, {"minutes": 0.0}, "must be more than 0"),
    ],
)
def test_mistakes(tmp_path, paced, sizes, how, words):
    with pytest.raises(UserError, match=words):
        draft("n", DataConfig(name=write_photographs(tmp_path, sizes)), **how)


def test_the_pace_is_measured_by_steps(tmp_path, monkeypatch):
    clock = itertools.count(step=0.5)
    monkeypatch.setattr(drafting.time, "perf_counter", lambda: next(clock))
    found = draft("n", DataConfig(name=write_npz(tmp_path / "data")), (2, 4), minutes=1e6)
    assert found.seconds == {2: 0.5, 4: 0.5}
