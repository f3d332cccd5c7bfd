"""The comparison of architectures: its rows, what it measures of them, and what it prints."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import images, smooth_images, trained

import mrcnf
from experiments import architectures, architectures_table
from experiments.architectures_steps import rows_of, settings_of
from mrcnf.data.datasets import Images
from mrcnf.model.level import Level
from mrcnf.runs import config

FOLDER = Path(__file__).parents[1] / "experiments"


@pytest.mark.parametrize("recipe, size", [("architectures", "cpu"), ("architectures-gpu", "gpu")])
def test_rows_have_as_many_parameters(recipe, size):
    counts = {}
    for row in rows_of(size):
        if row.endswith("-adversarial"):
            continue  # what it is without
        own = config.load(FOLDER / f"{recipe}.toml", settings_of(size, row))
        model = dataclasses.replace(own.model, channels=3)
        at = {r: own.at_level(r) for r in model.resolutions}
        with torch.device("meta"):
            levels = [Level(model, r, c.field, flow=c.flow) for r, c in at.items()]
        counts[row] = sum(p.numel() for level in levels for p in level.parameters())
    middle = (max(counts.values()) + min(counts.values())) / 2
    assert all(abs(n / middle - 1) < 0.05 for n in counts.values()), counts


def test_there_is_no_other_row():
    with pytest.raises(subprocess.CalledProcessError):
        settings_of("cpu", "coupling-two")


@pytest.fixture
def few(monkeypatch):
    """Fewer images of everything, drawn instead of CIFAR-10, CIFAR-100 and Fashion-MNIST."""
    for name, number in {"TESTED": 8, "SCORED": 4, "CODED": 2, "SAMPLED": 2, "ATTACKED": 2,
                         "GRADIENTS": 2, "PATCHES": (8,)}.items():  # fmt: skip
        monkeypatch.setattr(architectures, name, number)

    def load(name, split, root, resolution=None):
        pixels = smooth_images(16, 1 if name == "fashion-mnist" else 3, 32, seed=len(name))
        return Images(pixels, name, split)

    monkeypatch.setattr(mrcnf.data, "load", load)


@pytest.mark.slow
def test_a_row_is_measured_once_and_told(few, tmp_path, monkeypatch, capsys):
    run = tmp_path / "coupling-wavelet-2"
    trained(run, "model.resolutions=[16,32]", "flow.kind='coupling'", "flow.couplings=2",
            "train.objective='likelihood'", data=images(8, 3, 32))  # fmt: skip
    monkeypatch.setattr("sys.argv", ["architectures", str(run)])
    architectures.main()
    first = (run / "measured.json").read_text()
    measured = json.loads(first)
    assert list(measured) == ["bits", "cost", "codec", "ood", "attack"]
    assert len(measured["bits"]["bits"]) == 8 and measured["codec"]["same"]
    assert set(measured["ood"]["kinds"]) == {
        "CIFAR-100", "Fashion-MNIST", "constant", "noise", "patches of 8"
    }  # fmt: skip
    capsys.readouterr()
    architectures.main()
    assert (run / "measured.json").read_text() == first and not capsys.readouterr().out

    (tmp_path / "coupling-one").mkdir()
    (tmp_path / "coupling-one/measured.json").write_text(first)
    # Once collected, the numbers give the same tables without the runs.
    told = []
    for out in (tmp_path, tmp_path / "all.json"):
        arguments = ["table", str(out), "--collect", str(tmp_path / "all.json")]
        monkeypatch.setattr("sys.argv", [*arguments, "--figures", str(tmp_path / "figures")])
        architectures_table.main()
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and f"{measured['cost']['parameters']:,}" in told[0]
    assert "| coupling | +0.0000 ± 0.0000 |" in told[0]
    assert len(list((tmp_path / "figures").glob("*.png"))) == 6


def test_the_page_has_the_tables_of_the_numbers_that_are_kept(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["table", str(FOLDER / "architectures.json")])
    architectures_table.main()
    page = (FOLDER / "architectures.md").read_text()
    tables = capsys.readouterr().out.strip("\n").split("\n\n")
    assert len(tables) == 11 and all(table in page for table in tables)
