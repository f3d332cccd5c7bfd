"""The benchmarks run and keep their contract. How fast anything is, no test says."""

import json
import math
import subprocess
import sys

import pytest
import torch

from benchmarks import coding, machine, outgrown, steps, timing, workload
from benchmarks.__main__ import CODING, WORKS, coders, main
from mrcnf.model.settings import FieldConfig, ModelConfig

KEYS = {"work", "device", "ratio", "seconds", "reference_seconds", "peak_bytes"}


@pytest.mark.slow
def test_a_quick_run_writes_rows_of_the_contract(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MRCNF_DATA", str(tmp_path))  # photos, whatever lies on this machine
    monkeypatch.setattr(coding, "MODEL", tmp_path / "none")
    monkeypatch.setattr(coding, "FIELD", FieldConfig(width=8, depth=1))
    out, figure = tmp_path / "rows.json", tmp_path / "scale.png"
    arguments = ["--quick", "--device", "cpu", "--batch", "1", "--repeats", "1", "--train", "4"]
    assert main([*arguments, "--json", str(out), "--plot", str(figure)]) == 0
    rows = json.loads(out.read_text())
    assert {row["work"] for row in rows} == set(WORKS)
    for row in rows:
        assert row.keys() >= KEYS | {"name", "nfe", "settings", "reference_settings", "torch"}
        assert row["device"] == "cpu" and row["data"].startswith("photos")
        for key in ("ratio", "seconds", "reference_seconds"):
            assert math.isfinite(row[key]) and row[key] > 0
        assert row["ratio"] == pytest.approx(row["reference_seconds"] / row["seconds"])
        assert row["peak_bytes"] > 0 and row["parameters"] == 509_604
    assert figure.stat().st_size > 0
    assert "ml_step" in capsys.readouterr().out


def test_mistakes_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--json", str(tmp_path / "x.json"), "--work", "ml_step,naps"])
    assert stopped.value.code == 2
    assert "naps" in capsys.readouterr().err


def test_alternate_runs_in_turn_and_drops_the_first_round():
    order: list[str] = []
    works = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = timing.alternate(works, torch.device("cpu"), 2)
    assert order == ["a", "b"] * 3
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


def test_compare_takes_medians():
    row = timing.compare([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (2.0, 2.0, 3.0)


def test_peak_counts_what_is_held_at_once():
    def work() -> None:
        for _ in range(3):
            held = torch.zeros(1_000_000)
            del held

    peak = timing.peak_bytes(work, torch.device("cpu"))
    assert 4_000_000 <= peak < 8_000_000


def test_flop_of_a_step_are_counted():
    level, x, log_q = workload.single_level(16, "cpu", 1)
    once = machine.flop(lambda: steps.likelihood_step(level, x, log_q, steps.Solver("euler", 1)))
    twice = machine.flop(lambda: steps.likelihood_step(level, x, log_q, steps.Solver("euler", 2)))
    assert 0 < 1.8 * once < twice < 2.2 * once


@pytest.mark.slow
def test_coding_is_timed_on_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(coding, "MODEL", tmp_path / "none")
    monkeypatch.setattr(coding, "CONFIG", ModelConfig((4, 8), channels=3))
    monkeypatch.setattr(coding, "FIELD", FieldConfig(width=4, depth=1))
    bench = coding.Bench(2, quick=True)
    for work in CODING:  # popping compares with what was pushed
        (row,) = bench.rows(work, 1)
        assert row.keys() >= (KEYS - {"device"}) | {"name", "settings", "reference_settings"}
        # Euler halves from both ends, the middle, and what neighbours share; the base's midpoints.
        assert row["nfe"] == {4: 4 * 16 + 1, 8: 2 * 16 + 1}
        assert row["evaluations_per_pixel"] == (65 + 33) * 16 / 64
        assert all(passes > 5 * row["nfe"][r] for r, passes in row["reference_nfe"].items())
        assert abs(row["bits_over_reference"]) < 0.2 < row["bits_per_dim"]
        assert 0 < row["share_of_convolutions"] < 1 and row["megabytes_per_second"] > 0


def test_coding_is_left_out_where_it_cannot_be(monkeypatch, capsys):
    makers = coders("cuda", 1, 1, True)
    assert [make() for make in makers.values()] == [[], []] and set(makers) == set(CODING)
    assert "CPU" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "constriction", None)
    assert coders("cpu", 1, 1, True)["compress"]() == []
    assert "mrcnf[compress]" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # PyTorch's tracer warns of what it does itself
def test_the_dynamics_compile_as_one_graph():
    """With nothing left to eager, and to the same gradient (aot_eager: tracing, no C++)."""
    level, x, log_q = workload.single_level(16, "cpu", 1)
    compiled, run = steps._compiled(level, x, log_q, "aot_eager")
    found = steps.gradient(compiled, run)
    expected = steps.gradient(level, lambda: steps.likelihood_step(level, x, log_q, steps.MAIN))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("missing", ["pywt", "pywt tyro PIL pooch tqdm matplotlib tomli_w"])
def test_package_and_benchmarks_load_on_a_bare_machine(missing):
    """A lent GPU machine has PyTorch and torchdiffeq, and neither data nor command line."""
    blocked = missing.split()
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    code += "import benchmarks.__main__, benchmarks.workload as w\nprint(w.images(32, 2)[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "synthetic" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not outgrown.anonymous(), reason="the system does not say what memory is whose")
def test_memory_does_not_grow_with_the_file(tmp_path):
    held = {}
    for gigabytes in (0.01, 0.3):
        folder = tmp_path / str(gigabytes)
        row = outgrown.measure(folder, gigabytes, steps=2, laps=1, device="cpu")
        held[gigabytes] = row["anonymous_most"]
        assert row["bytes"] == pytest.approx(gigabytes * 1e9, rel=0.01)
    assert held[0.3] - held[0.01] < 0.1 * 0.29e9


def test_outgrown_says_mistakes_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        outgrown.main(["--gigabytes", "1e9", "--folder", str(tmp_path)])
    assert stopped.value.code == 2 and "make room" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
