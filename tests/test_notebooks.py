"""What the notebooks promise their readers; that they run is for nbmake (.ci/run)."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in NOTEBOOKS])
def test_notebooks_are_small_and_read_well_without_being_run(path):
    assert path.stat().st_size < 300_000
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert "display_data" in kinds and "error" not in kinds
    assert "".join(cells[0]["source"]).startswith("# ")
    assert "## Something to try" in "".join(cells[-1]["source"])
    assert not re.search(r"/(tmp|home|root|work)/", path.read_text())


def test_every_notebook_is_listed():
    page = (ROOT / "docs/notebooks.md").read_text()
    listed = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    assert listed == [path.stem for path in NOTEBOOKS]
