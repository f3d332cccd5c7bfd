"""The figures."""

import shutil

import pytest
import torch
from tiny import smooth_images

from mrcnf.data.imagefile import read_image
from mrcnf.errors import UserError
from mrcnf.measure.entropy import NORMAL, SplitEntropy
from mrcnf.report import plot


@pytest.fixture
def drawn(monkeypatch):
    """The figures instead of their files."""
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.append(figure))
    yield figures
    for figure in figures:
        plot._pyplot().close(figure)


def colours(axis):
    return {line.get_label(): line.get_color() for line in axis.lines}


def test_a_run_has_one_colour_in_all_panels_and_one_legend_names_all(runs, tmp_path, drawn):
    """The first run lacks the second panel's level: there the second must not take its colour."""
    a, b = shutil.copytree(runs[0], tmp_path / "a"), runs[1]
    shutil.rmtree(a / "level-4")
    plot.bpd_curves(tmp_path / "curves.png", [a, b])
    (figure,) = drawn
    first, second = figure.axes
    assert colours(first).keys() == {"a", "b"} and len(set(colours(first).values())) == 2
    assert colours(second) == {"b": colours(first)["b"]}
    (legend,) = [*figure.legends, *filter(None, (axis.get_legend() for axis in figure.axes))]
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    shown = {line.get_label(): line.get_color() for line in legend.get_lines()}
    assert shown == colours(first)


def test_runs_of_one_name_are_two_lines_with_two_names(runs, tmp_path, drawn):
    other = shutil.copytree(runs[0], tmp_path / "a")
    plot.bpd_curves(tmp_path / "curves.png", [runs[0], other])
    for axis in drawn[0].axes:
        assert colours(axis).keys() == {str(runs[0]), str(other)}
        assert len(set(colours(axis).values())) == 2


@pytest.mark.parametrize(
    ("name", "start"), [("x.png", b"\x89PNG"), ("x.PDF", b"%PDF"), ("x.svg", b"<?xml")]
)
def test_the_name_says_the_format_and_bytes_are_the_same_again(runs, tmp_path, name, start):
    for folder in ("one", "two"):
        plot.training_curves(tmp_path / folder / name, runs[0])
    one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
    assert one.startswith(start) and one == two


def test_another_format_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match=r"x\.jpg: .*\.png, \.pdf or \.svg"):
        plot.training_curves(tmp_path / "x.jpg", runs[0])
    assert not list(tmp_path.iterdir())


def test_many_runs_are_told_apart():
    styles = [tuple(plot.line_style(i).values()) for i in range(30)]
    assert len(set(styles)) == 30
    assert len({colour for colour, _, _ in styles[:8]}) == 8


def test_the_loss_curve_passes_over_the_test_rows(runs, tmp_path):
    plot.training_curves(tmp_path / "loss.png", runs[0])
    assert read_image(tmp_path / "loss.png").dtype == torch.uint8


@pytest.mark.parametrize(("height", "width"), [(4, 4), (30, 200), (300, 20), (300, 451)])
@pytest.mark.parametrize("known", [True, False])
def test_pictures_of_a_panel_keep_their_shape(tmp_path, drawn, height, width, known):
    draws = torch.zeros(2, 3, 1, 2 * height, 2 * width, dtype=torch.uint8)
    inputs = torch.zeros(3, 1, height, width, dtype=torch.uint8)
    plot.upscaling_panel(tmp_path / "panel.png", inputs, draws, draws[0] if known else None)
    (figure,) = drawn
    assert len(figure.axes) == 3 * (4 if known else 3)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == [f"input {width}×{height}", "draw 1", "draw 2"]
    figure.canvas.draw()
    longer = 2 * max(height, width)
    for axis in figure.axes:
        box = axis.get_window_extent()
        zoom = box.width / (2 * width)
        assert box.height / (2 * height) == pytest.approx(zoom, rel=1e-6)
        assert 165 < zoom * longer < 645
        if longer < 640:
            assert zoom == pytest.approx(round(zoom), rel=1e-6)  # square pixels, all alike


def test_a_panel_shows_the_pixels_it_was_given(tmp_path):
    inputs = smooth_images(1, channels=3, side=8)
    draws = torch.randint(256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    plot.upscaling_panel(tmp_path / "panel.png", inputs, draws)
    panel = read_image(tmp_path / "panel.png", channels=3)[:3]
    zoom = 11  # 169 dots and no fewer
    side = 16 * zoom
    bottom = panel.shape[1] - 8
    for k, picture in enumerate((plot.enlarge(inputs, 2)[0], *draws[:, 0])):
        left = 8 + k * (side + 8)
        cell = panel[:, bottom - side : bottom, left : left + side]
        assert torch.equal(cell[:, zoom // 2 :: zoom, zoom // 2 :: zoom], picture)


def test_the_running_mean_has_no_start_bias():
    assert plot.smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0] * 3)
    assert plot.smooth([0.0, 1.0], decay=0.5) == pytest.approx([0.0, 1 / 1.5])


def test_entropies_have_a_panel_for_each_split_and_a_point_for_each_channel(tmp_path, drawn):
    one = SplitEntropy(8, 1, [1.0, 2.0], [0.5, 0.1], [1.5, 2.5], 0.7)
    two = SplitEntropy(8, 2, [1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4], [2.0] * 4, 0.3)
    plot.split_entropies(tmp_path / "entropy.png", {"none": [one, two], "learned": [two]})
    (figure,) = drawn
    first, second = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["level 8, split 1", "level 8, split 2"]

    def points(axis, label):
        return [list(line.get_ydata()) for line in axis.lines if line.get_label() == label]

    assert points(first, "leaves") == [one.leaves] and points(first, "stays") == [one.stays]
    assert points(second, "leaves") == [two.leaves] * 2
    places = [line.get_xdata()[0] for line in second.lines if line.get_label() == "leaves"]
    assert places == pytest.approx([0.16, 1.16])
    means = [line.get_ydata()[0] for line in first.lines if line.get_linewidth() == 2]
    assert means == pytest.approx([0.3, 1.5])
    broken = [line.get_ydata()[0] for line in first.lines if line.get_linestyle() == "--"]
    assert broken == pytest.approx([NORMAL])
    assert [text.get_text() for text in second.get_xticklabels()] == ["none", "learned"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["stays", "leaves"]
