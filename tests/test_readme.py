"""What README and pages of docs/ say is true: commands, examples, links, the layout."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from mrcnf import cli
from mrcnf.cli.app import COMMANDS
from mrcnf.data.datasets import Images
from mrcnf.data.imagefile import save_image
from mrcnf.runs.checkpoint import describe
from mrcnf.runs.config import from_table
from mrcnf.training import trainer as train

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
CARDS = sorted((ROOT / "experiments/models").glob("*/README.md"))
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *DOCS, *CARDS]
ALL = [*PAGES, ROOT / "experiments/README.md", ROOT / "benchmarks/README.md"]
LAYOUT = (ROOT / "CONTRIBUTING.md").read_text().split("## Layout")[1]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    """Lines of a page's shell blocks that are mrcnf's, and go nowhere but to the screen."""
    lines = [line.split("#")[0].strip() for b in blocks(page, "bash") for line in b.splitlines()]
    return [line for line in lines if line.startswith("mrcnf ") and ">" not in line]


BY_COMMAND = {}
for page in PAGES:
    for command in commands(page):
        BY_COMMAND.setdefault(command, page)
SHOWN = [
    pytest.param(command, marks=() if page in TOP else pytest.mark.slow)
    for command, page in BY_COMMAND.items()
]
EXAMPLES = [
    pytest.param(page, id=name_of(page), marks=() if page in TOP else pytest.mark.slow)
    for page in PAGES
    if blocks(page, "python")
]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Barely trained 8-16-32 runs: runs/demo of grey images, runs/views of colours."""
    folder = tmp_path_factory.mktemp("readme")
    table = {
        "field": {"width": 4, "depth": 1},
        "train": {"steps": 1, "batch": 4, "evaluate_every": 1},
        "solver": {"steps": 2},
    }
    for run, channels, data in (("views", 3, "folder:photos"), ("demo", 1, "photos")):
        pixels = torch.randint(0, 256, (8, channels, 32, 32), dtype=torch.uint8)
        images = Images(pixels, "noise", "train")
        settings = from_table({**table, "data": {"name": data}})
        for resolution in (8, 16, 32):
            trainer = train.Trainer(
                settings, resolution, images, folder / "runs" / run, test=images
            )
            trainer.run(progress=False)
    split = {
        **table,
        "model": {"resolutions": [32]},
        "flow": {"kind": "coupling", "couplings": 1, "splits": 1},
        "train": {**table["train"], "objective": "likelihood"},
    }
    train.Trainer(from_table(split), 32, images, folder / "runs/splits").run(progress=False)
    return folder


@pytest.fixture(scope="module")
def workplace(tiny_run):
    """The files that the README's commands name, small."""
    (tiny_run / "experiments").symlink_to(ROOT / "experiments")
    (tiny_run / "examples").symlink_to(ROOT / "examples")
    for name, run in (("cifar10-cpu", "views"), ("mine", "views"), ("other", "demo")):
        (tiny_run / "runs" / name).symlink_to(tiny_run / "runs" / run)
    (tiny_run / "others").symlink_to(tiny_run / "photos")
    noise = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    for i, image in enumerate(noise):
        for split in ("train", "test"):
            save_image(tiny_run / f"photos/{split}/{i}.png", image)
    save_image(tiny_run / "photo.png", noise[0, :, :16, :16])
    return tiny_run


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_run(page, workplace, monkeypatch, capsys):
    """All of a page's, one after another; they assert what they claim."""
    monkeypatch.chdir(workplace)
    names: dict = {}
    for example in blocks(page, "python"):
        exec(example, names)
    if page == ROOT / "README.md":
        assert "(8, 16, 32)" in capsys.readouterr().out
        assert names["finer"].shape == (4, 1, 32, 32)
        assert names["path"].shape == (5, 1, 1, 32, 32)
        assert names["large"].shape == (1, 1, 90, 122)
        assert describe(names["run"])[8]["step"] == 20
        expected = -names["detail"][0].numel() / 2  # the divergence of -y/2
        assert names["divergence"].item() == pytest.approx(expected)


@pytest.mark.parametrize("command", SHOWN)
def test_the_commands_run(command, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    words = shlex.split(command.replace("--n 64", "--n 4"))[1:]
    quick = {
        "train": ["--dry-run"], "extend": ["train.steps=1", "train.batch=2"],
        "compress": ["--steps", "2"], "attack": ["--steps", "2"], "report": ["--images", "4"],
    }  # fmt: skip
    extra = quick.get(words[0], []) if "--dry-run" not in words else []
    cli.main([*words, *extra])
    assert capsys.readouterr().out


def test_there_are_commands_to_check():
    assert len(commands(ROOT / "README.md")) >= 5
    assert len(SHOWN) >= 30 and len(EXAMPLES) >= 5


def test_every_command_has_its_help_on_the_page_of_commands():
    page = (ROOT / "docs/commands.md").read_text()
    assert re.findall(r"^```\{help\} (\w+)$", page, re.MULTILINE) == list(COMMANDS)


def headings(page):
    """A page's anchors, as code hosts and the built pages spell them."""
    text = page.read_text()
    for included in re.findall(r"^```\{include\} (\S+)", text, re.MULTILINE):
        text += (page.parent / included).read_text()
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}


@pytest.mark.parametrize("page", [pytest.param(p, id=name_of(p)) for p in ALL])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_every_page_is_in_the_contents():
    listed = set()
    for page in DOCS:
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.M | re.S):
            entries = [line for line in tree.split() if re.fullmatch(r"[a-z][\w/-]+", line)]
            listed |= {page.parent / f"{entry}.md" for entry in entries}
    assert set(DOCS) - {ROOT / "docs/index.md"} <= listed


def test_the_test_command_is_the_one_ci_runs():
    lines = [line for b in blocks(ROOT / "README.md", "bash") for line in b.splitlines()]
    (command,) = [line for line in lines if line.endswith("&& pytest")]
    assert command in (ROOT / ".ci/run").read_text()


def test_the_layout_has_a_line_for_every_file():
    listed = re.findall(r"^    (mrcnf/[\w/]+\.py) ", LAYOUT, flags=re.MULTILINE)
    files = [p.relative_to(ROOT).as_posix() for p in (ROOT / "mrcnf").rglob("*.py")]
    empty = {"mrcnf/__main__.py", *(f for f in files if re.fullmatch(r"mrcnf/\w+/__init__.py", f))}
    assert sorted(listed) == sorted(set(files) - empty)


def test_every_recipe_of_the_experiments_table_exists():
    table = (ROOT / "experiments/README.md").read_text()
    named = set(re.findall(r"experiments/([\w-]+\.toml)", table))
    assert named == {path.name for path in (ROOT / "experiments").glob("*.toml")}
