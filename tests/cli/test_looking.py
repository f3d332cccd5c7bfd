"""The commands that look at what is there."""

import json

import pytest
from terminal import mrcnf_says

import mrcnf
from mrcnf import cli
from mrcnf.measure import check
from mrcnf.runs import checkpoint


def test_info_needs_only_the_weights(run, capsys):
    for path in run.rglob("*"):
        if path.is_file() and path.name != checkpoint.WEIGHTS:
            path.unlink()
    said = mrcnf_says(capsys, "info", run)
    level = mrcnf.load(run).level(4)
    count = sum(p.numel() for p in level.parameters())
    assert said.count("\n") == 2
    assert f"level 4: {count:,} parameters (continuous flow; field: kind residual, width 4" in said
    assert "flow-matching, step 4 of 4" in said and "npz:" in said


@pytest.mark.slow
def test_check_proves_the_numerics(tmp_path, capsys):
    said = mrcnf_says(capsys, "check", "--json", tmp_path / "check.json")
    findings = json.loads((tmp_path / "check.json").read_text())
    assert len(findings) == said.count("ok ") == said.count("\n") > 10
    assert all(finding["measured"] <= finding["bound"] for finding in findings)


def test_a_failed_check_is_an_error(capsys, monkeypatch):
    failed = check.Finding("two is one", 2.0, 1.0)
    monkeypatch.setattr(check, "run", lambda: iter([failed]))
    with pytest.raises(RuntimeError, match="check failed"):
        cli.main(["check"])
    assert capsys.readouterr().out.startswith("FAILED two is one: 2 (bound 1e+00)")
