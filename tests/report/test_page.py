"""The pages: complete, by themselves, true to their commands; what a run lacks is said."""

import base64
import io
import json
import re
import shlex
import shutil

import browser
import numpy as np
import pytest
import torch
from pages import read_page
from PIL import Image
from tiny import images, tiny

from mrcnf import cli
from mrcnf.errors import UserError
from mrcnf.measure.classical import available
from mrcnf.report import compare, inline, numbers, page, plot
from mrcnf.report.document import Page, Section, Swatch, Table, Text, render
from mrcnf.report.subject import Limits, Subject
from mrcnf.training import trainer as train

SECTIONS = [
    "Bits per dimension", "Training", "Samples", "Upscalings", "Nearest training images",
    "Likelihoods", "Configuration", "Provenance",
]  # fmt: skip
FEW = Limits(images=6, training_images=40, device="cpu")


@pytest.fixture(scope="module")
def subject(runs):
    return Subject(runs[0], limits=FEW)


@pytest.fixture(scope="module")
def written(subject, tmp_path_factory):
    """The page of a run, which has all there is."""
    path = tmp_path_factory.mktemp("page") / "a.html"
    page.report(subject, path)
    return path


@pytest.fixture(scope="module")
def reader(written):
    return read_page(written)


def commands(reader):
    return [line for code in reader.all("code") for line in code.inside.splitlines()
            if line.startswith("mrcnf ")]  # fmt: skip


def test_the_page_needs_nothing_from_elsewhere(reader):
    assert not reader.all("script") and not reader.all("iframe")
    addresses = [
        element.attributes[name]
        for element in reader.elements
        for name in ("src", "href", "action", "srcset")
        if name in element.attributes
    ]
    assert len(addresses) > 10 and all(a.startswith(("data:", "#")) for a in addresses)
    (style,) = reader.all("style")
    assert "url(" not in style.inside and "@import" not in style.inside


def test_every_image_says_what_it_shows_and_headings_make_an_outline(reader):
    shown = [e.attributes.get("alt") for e in reader.all("img")]
    drawn = [e.attributes.get("aria-label") for e in reader.all("svg", role="img")]
    assert len(shown) >= 8 and len(drawn) == len(reader.all("svg")) == 7
    assert all(len(words) > 20 for words in [*shown, *drawn])
    assert len(reader.all("h1")) == 1
    assert [h.inside for h in reader.all("h2")] == SECTIONS
    ids = [e.attributes["id"] for e in reader.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    links = [a.attributes["href"] for a in reader.all("a")]
    assert len(links) == len(SECTIONS) and {link[1:] for link in links} <= set(ids)


def test_nothing_is_missing_from_a_whole_run(reader, subject):
    assert not [p for p in reader.all("p") if p.attributes.get("class") == "aside"]
    (number,) = [p for p in reader.all("p") if p.attributes.get("class") == "number"]
    assert numbers.digits(subject.evaluation) in number.inside
    for name in available()[0]:
        assert name in reader.section("Bits per dimension")
    assert f"{subject.levels[4]['parameters']:,}" in reader.section("Training")
    for temperature in ("1", "0.9", "0.8"):
        assert f"samples at temperature {temperature}" in reader.section("Samples")
    assert "train.beta2" not in reader.section("Configuration").split("every setting")[0]
    assert "train.evaluate_every" in reader.section("Configuration").split("every setting")[0]
    assert subject.levels[4]["data"] in reader.section("Provenance")
    assert torch.__version__ in reader.section("Provenance")


def test_the_command_beside_a_number_gives_it(reader, subject, tmp_path):
    (command,) = [c for c in commands(reader) if c.startswith("mrcnf evaluate")]
    cli.main([*shlex.split(command)[1:], "--device", "cpu", "--json", str(tmp_path / "e.json")])
    evaluation = json.loads((tmp_path / "e.json").read_text())
    assert evaluation["bpd"] == subject.evaluation.bpd and evaluation["images"] == 6
    assert evaluation["bpd_stderr"] == subject.evaluation.bpd_stderr
    assert subject.evaluation.bits.sum(0).mean() == pytest.approx(evaluation["bpd"])


def test_the_other_commands_are_ones(reader, monkeypatch):
    """Their arguments are read as they would be; they are not called."""
    for command in commands(reader):
        cli.app.parse(shlex.split(command)[1:])
    kinds = {shlex.split(command)[1] for command in commands(reader)}
    assert kinds == {"evaluate", "sample", "upscale", "train", "report"}


def test_the_most_and_the_least_likely_images_are_those(reader, subject):
    total = subject.evaluation.bits.sum(0)
    lowest, highest = float(total.min()), float(total.max())
    assert f"{lowest:.2f} to" in reader.section("Likelihoods")
    assert f"least likely, {highest:.2f} to" in reader.section("Likelihoods")


def test_a_run_whose_images_are_not_at_hand_says_so(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    gone = ["data.name=npz:gone"]
    cli.main(["report", str(run), "--device", "cpu", *gone])
    reader = read_page(run / "report.html")
    assert [h.inside for h in reader.all("h2")] == SECTIONS
    assert not [p for p in reader.all("p") if p.attributes.get("class") == "number"]
    for title in ("Bits per dimension", "Upscalings", "Nearest training images", "Likelihoods"):
        assert re.search(r"Not shown, because .*gone.*\.", reader.section(title)), title
    assert "Not at hand: " in reader.section("Provenance")
    assert "samples at temperature 0.9" in reader.section("Samples")


def test_a_run_that_lacks_a_level_and_its_log_says_so(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    shutil.rmtree(run / "level-2")
    (run / "level-4/metrics.jsonl").unlink()
    page.report(Subject(run, limits=FEW), tmp_path / "page.html")
    reader = read_page(tmp_path / "page.html")
    assert "Not finished: level 2 is not trained yet." in [p.inside for p in reader.all("p")]
    assert "level 2 is missing" in reader.section("Samples")
    assert "no level has a metrics.jsonl" in reader.section("Training")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "page.pdf"], "end the name in .html"),
        (["--images", "1"], "at least 2 test images"),
        (["train.steps=3"], "cannot be changed in a trained model"),
    ],
)
def test_what_a_page_cannot_be_told_is_refused(runs, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        cli.app.parse(["report", str(runs[0]), *cli.app.gather_overrides(arguments)])()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_runs_side_by_side(runs, tmp_path, capsys):
    out = tmp_path / "both.html"
    options = ["--images", "6", "--training-images", "40", "--device", "cpu"]
    cli.main(["compare", *map(str, runs), "--out", str(out), *options])
    assert capsys.readouterr().out.strip() == compare.table(compare.compare(runs))
    reader = read_page(out)
    assert [h.inside for h in reader.all("h2")] == SECTIONS
    a, b = (Subject(run, limits=FEW).evaluation for run in runs)
    change = b.bits.sum(0) - a.bits.sum(0)
    error = change.std() / len(change) ** 0.5
    assert f"{change.mean():+.3f} ± {error:.3f}" in reader.section("Bits per dimension")
    assert numbers.digits(a) in reader.section("Bits per dimension")
    assert "train.beta2 = 0.5" in reader.section("Configuration")
    legends = [li.inside.split() for li in reader.all("li") if "●" in li.inside]
    assert legends == [["●", "a"], ["●", "b"]] * 2
    text = out.read_text()
    styles = re.findall(r'class="swatch"[^>]*color: (#\w+)', text)
    assert set(styles) == set(plot.COLOURS[:2])


def test_a_run_is_compared_with_others_only(runs, tmp_path):
    with pytest.raises(UserError, match="named twice"):
        page.beside([runs[0], runs[0]], tmp_path / "page.html")
    with pytest.raises(UserError, match="no runs"):
        page.beside([], tmp_path / "page.html")


@pytest.mark.slow
def test_a_model_of_one_level_and_of_no_solver_has_a_page(tmp_path):
    """And of colour."""
    settings = tiny(
        "model.resolutions=[4]", "flow.kind=coupling", "flow.couplings=1",
        "train.objective=likelihood", "train.steps=1", f"data.name=npz:{tmp_path / 'data'}",
    )  # fmt: skip
    (tmp_path / "data").mkdir()
    data = images(channels=3)
    for split in ("train", "test"):
        np.savez(tmp_path / f"data/{split}.npz", images=data.pixels.permute(0, 2, 3, 1).numpy())
    train.Trainer(settings, 4, data, tmp_path / "run").run(progress=False)
    page.report(Subject(tmp_path / "run", limits=FEW), tmp_path / "page.html")
    reader = read_page(tmp_path / "page.html")
    assert "the level 4 alone" in reader.section("Upscalings")
    assert "No level has a solver" in reader.section("Bits per dimension")
    assert "nothing coarser to show" in reader.section("Samples")
    (command,) = [c for c in commands(reader) if c.startswith("mrcnf evaluate")]
    assert "--convergence" not in command


def test_names_are_text_and_nothing_else():
    hostile = '<script>alert("1")</script>'
    words = Section(hostile, [Text(hostile), Table((hostile,), [(hostile,)], hostile)])
    made = render(Page(hostile, hostile, number=hostile, notes=[hostile], sections=[words]))
    assert "<script" not in made and made.count("&lt;script&gt;") > 8


def test_panels_share_no_identifiers_and_wear_the_colours_of_the_page():
    def paint(axis, colour=plot.COLOURS[6]):
        axis.plot([0, 1], [0, 1], color=colour)

    one, two = (
        inline.panel(paint, 'a "picture"', title=title, across="x", up="y") for title in "ab"
    )
    found = [set(re.findall(r' id="([^"]*)"', panel)) for panel in (one, two)]
    assert found[0] and not found[0] & found[1]
    for panel, ids in zip((one, two), found, strict=True):
        assert {*re.findall(r'href="#([^"]*)"', panel), *re.findall(r"url\(#(.*?)\)", panel)} <= ids
        assert "#010203" not in panel and "#000000" not in panel
    assert 'stroke: currentColor' in one and 'aria-label="a &quot;picture&quot;"' in one
    assert one == inline.panel(paint, 'a "picture"', title="a", across="x", up="y")
    assert Swatch("x", "#000000").ink == "currentColor"


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_keep_their_pixels_and_their_gaps_are_transparent(channels):
    pixels = torch.randint(256, (3, channels, 4, 4), dtype=torch.uint8)
    address, width, height = inline.png(pixels, 2)
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as image:
        assert (width % image.width, height % image.height) == (0, 0)
        assert inline.COLUMN - image.width < width <= inline.COLUMN
        array = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(array[:-1, 1:5, 6:10], pixels[1])
    opaque = torch.zeros(11, 11, dtype=torch.uint8)
    for top, left in ((1, 1), (1, 6), (6, 1)):
        opaque[top : top + 4, left : left + 4] = 255
    assert torch.equal(array[-1], opaque)


@pytest.mark.slow
@pytest.mark.skipif(browser.PROGRAM is None, reason=browser.WHY)
def test_pages_in_a_browser(runs, written, tmp_path):
    """No complaints, nothing fetched, nothing wider than the window, dark where that is wished."""
    both = tmp_path / "both.html"
    page.beside(runs, both, limits=FEW)
    tab = browser.opened(tmp_path / "profile")
    try:
        for path in (written, both):
            papers = set()
            for width in (1280, 390):
                for dark in (False, True):
                    tab.open(path, width, dark)
                    assert tab.value("document.documentElement.scrollWidth") <= width
                    assert tab.value("[...document.images].every(i => i.naturalWidth > 0)")
                    assert tab.value("document.images.length") >= 8
                    paper = tab.value("getComputedStyle(document.documentElement).backgroundColor")
                    ink = tab.value("getComputedStyle(document.querySelector('svg text')).fill")
                    red = [int(re.findall(r"\d+", colour)[0]) for colour in (paper, ink)]
                    assert (red[0] < 60 and red[1] > 180) if dark else (red[0] > 240 > 60 > red[1])
                    papers.add(paper)
            assert len(papers) == 2
        assert tab.complaints == []
        outside = [url for url in tab.requests if not url.startswith(("data:", "file:"))]
        assert outside == [] and len(tab.requests) >= 8
    finally:
        tab.close()
