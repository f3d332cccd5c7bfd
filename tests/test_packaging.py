"""What packages and citations say is true."""

import re
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest

import mrcnf
from mrcnf.runs.checkpoint import describe

ROOT = Path(__file__).parents[1]


def test_the_version_is_written_once_and_named_the_same():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: mrcnf.__version__"
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changes = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert mrcnf.__version__ == cited == changes[0]


def test_every_dependency_has_a_version_that_ci_uses():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"] + "".join(setup["options.extras_require"].values())
    named = {re.match(r"[\w-]+", line)[0] for line in re.split(r"\n", lines) if ">=" in line}
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert named <= set(pinned)


def test_the_build_needs_what_the_package_check_installs():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert f"pip install -q '{build['requires'][0]}'" in (ROOT / ".ci/package").read_text()


MODELS = sorted(path.name for path in (ROOT / "experiments/models").iterdir())


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_a_card_that_knows_its_sizes(model):
    folder = ROOT / "experiments/models" / model
    card = (folder / "README.md").read_text()
    sizes = [level["parameters"] for level in describe(folder).values()]
    for size in (sum(sizes), *sizes):
        assert f"{size:,}" in card
