"""A trained run, which the tests of the commands use."""

import shutil
from types import SimpleNamespace

import pytest
from tiny import TINY, smooth_images, write_npz

from mrcnf import cli
from mrcnf.data.imagefile import save_image


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A configuration, its data, a trained run and some images; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.toml").write_text(TINY.format(data=write_npz(folder / "data")))
    cli.main(["train", str(folder / "tiny.toml"), "--out", str(folder / "run")])
    for side in (1, 2, 5, 8):
        save_image(folder / f"{side}.png", smooth_images(1, side=side)[0])
    save_image(folder / "colour.png", smooth_images(1, channels=3)[0])
    save_image(folder / "oblong.png", smooth_images(1, side=8)[0][:, :4])
    return SimpleNamespace(folder=folder, config=folder / "tiny.toml", run=folder / "run")


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made.run, tmp_path / "run")
