"""The demo: its files and its report."""

import json
import re

from PIL import Image

from mrcnf import demo
from mrcnf.measure.classical import available
from mrcnf.runs import checkpoint

QUICK = [
    "model.resolutions=[4,8]", "field.width=4", "field.depth=1", "train.steps=3",
    "train.warmup=1", "train.log_every=1", "level.8.train.steps=3", "solver.steps=2",
    "evaluate.limit=9", "evaluate.batch=5", "train.device=cpu",
]  # fmt: skip


def test_the_demo_writes_its_report_and_figures(tmp_path, monkeypatch):
    recipe = demo.RECIPE.read_text().replace("[level.32.train]", "[level.8.train]")
    (tmp_path / "demo.toml").write_text(recipe)
    monkeypatch.setattr(demo, "RECIPE", tmp_path / "demo.toml")
    out = tmp_path / "out"
    printed = demo.run(out, QUICK)
    assert checkpoint.load(out).resolutions == (4, 8)
    for name in ("samples.png", "upscaling.png", "training.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 100
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["images"] == 9
    total = f"{evaluation['bpd']:.4f} ± {evaluation['bpd_stderr']:.4f} bits/dim"
    assert printed.startswith(total) and str(out / "report.html") in printed
    report = (out / "report.html").read_text()
    assert f"<strong>{evaluation['bpd']:.3f} ± {evaluation['bpd_stderr']:.3f}</strong>" in report
    assert "9 images of photos test, 8×8 in grey" in report
    for level in evaluation["levels"]:
        assert f">level {level['resolution']}</th>\n<td>{level['bpd']:.3f} ± " in report
    formats, left_out = available()
    for name in formats:
        row = rf">{name}</th>\n<td>\d+\.\d{{3}}</td>\n<td>\d+\.\d{{3}}</td>"
        assert len(re.findall(row, report)) == 1
    assert left_out.replace("'", "&#39;") in report
    assert f"mrcnf demo --out {out} " in report
