"""Scores of images of another kind, and the area under the curve that they give."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import images, smooth_images, trained

import mrcnf
from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.measure import ood
from mrcnf.measure.classical import bits_of_files
from mrcnf.measure.evaluate import bits_by_level

SCORES = st.lists(st.integers(-3, 3).map(float) | st.floats(-1e6, 1e6), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    settings = ["train.objective=likelihood", "flow.kind=coupling", "flow.couplings=1"]
    return mrcnf.load(trained(run, *settings, data=images()))


@given(negative=SCORES, positive=SCORES)
@settings(max_examples=50, deadline=None)
def test_the_area_is_the_probability_of_a_higher_score(negative, positive):
    negative, positive = np.array(negative), np.array(positive)
    pairs = np.sign(positive[:, None] - negative) / 2 + 0.5
    area = ood.auroc(negative, positive)
    assert area == pytest.approx(pairs.mean())
    assert ood.auroc(positive, negative) == pytest.approx(1 - area)


def test_the_area_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    for digits in (0, 1, 8):  # with many ties, some, none
        negative = random.normal(0, 1, 300).round(digits)
        positive = random.normal(0.5, 2, 200).round(digits)
        truth = np.repeat([0, 1], [300, 200])
        expected = metrics.roc_auc_score(truth, np.concatenate((negative, positive)))
        assert ood.auroc(negative, positive) == pytest.approx(expected, abs=1e-12)


def test_scores_that_are_none_are_refused():
    for bad in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(UserError):
            ood.auroc(bad, np.ones(2))


def test_the_interval_is_as_wide_as_the_area_scatters():
    """Against the standard deviation over fresh samples, and its formula's symmetry."""
    random = np.random.default_rng(0)
    pairs = [(random.normal(0, 1, 80), random.normal(1, 1, 120)) for _ in range(200)]
    spread = np.std([ood.auroc(*pair) for pair in pairs])
    widths = [np.ptp(ood.interval(*pair, resamples=200, seed=i))
              for i, pair in enumerate(pairs[:10])]  # fmt: skip
    assert np.mean(widths) == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_photographs_are_resampled_whole():
    random = np.random.default_rng(0)
    negative, positive = random.normal(0, 1, 10), random.normal(1, 1, 10)
    groups = np.arange(10).repeat(20)
    copies = negative.repeat(20), positive.repeat(20)
    few = ood.interval(negative, positive, seed=1)
    assert ood.interval(*copies, groups=(groups, groups), seed=1) == few
    assert np.ptp(ood.interval(*copies)) < np.ptp(few) / 2


def test_scores_are_what_they_say(model):
    pixels = smooth_images(6, seed=3)
    found = ood.scores(model, pixels, typical=4.0, codec="PNG", batch=6)
    bits = bits_by_level(model, pixels, batch=6).numpy()
    total = bits.sum(0)
    assert tuple(found) == ood.names(model)
    np.testing.assert_allclose(found["likelihood"], -total)
    np.testing.assert_allclose(found["level-4"], -bits[1])
    np.testing.assert_allclose(found["typicality"], -abs(total - 4.0))
    np.testing.assert_allclose(found["complexity"], bits_of_files(pixels, "PNG").numpy() - total)
    assert list(ood.scores(model, pixels, wanted=["level-2"])) == ["level-2"]
    assert "typicality" not in ood.scores(model, pixels)


def test_unknown_scores_are_refused(model):
    pixels = smooth_images(2)
    with pytest.raises(UserError, match=r"'levle-2': choose one of .* did you mean level-2\?"):
        ood.scores(model, pixels, wanted=["levle-2"])
    with pytest.raises(UserError, match="training images"):
        ood.scores(model, pixels, wanted=["typicality"])
    with pytest.raises(UserError, match="channel"):
        ood.scores(model, smooth_images(2, channels=3))


def test_two_sets_are_told_apart(model):
    inside = images(12, seed=1)
    outside = Images(ood.noise(9, 1, 4), "noise", "")
    found = ood.detect(model, inside, outside, training=smooth_images(12))
    assert set(found.auroc) == set(found.interval) == set(ood.names(model))
    assert found.auroc["likelihood"] > 0.9 and found.bpd[1] > found.bpd[0]
    assert found.typical == pytest.approx(found.bpd[0], abs=1)
    for score, area in found.auroc.items():
        low, high = found.interval[score]
        assert 0 <= low <= area <= high <= 1
        counts = found.histograms[score]
        assert (sum(counts["inside"]), sum(counts["outside"])) == (12, 9)
    assert "noise" in str(found) and found.to_dict()["images"] == [12, 9]


def test_drawn_images():
    flat = ood.constant(50, 3, 4)
    assert flat.dtype == torch.uint8 and flat.shape == (50, 3, 4, 4)
    assert torch.equal(flat, flat[..., :1, :1].expand_as(flat)) and len(flat.unique()) > 50
    drawn = ood.noise(50, 3, 4, seed=1)
    assert abs(drawn.double().mean() - 127.5) < 10 and int(drawn.max()) > 250
    assert not torch.equal(drawn, ood.noise(50, 3, 4, seed=2))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_shuffled_patches_are_the_same_patches(patch):
    pixels = torch.arange(2 * 3 * 64).reshape(2, 3, 8, 8).to(torch.uint8)
    found = ood.shuffled(pixels, patch, seed=1)

    def patches(image):
        cells = image.unfold(1, patch, patch).unfold(2, patch, patch)  # (C, ·, ·, P, P)
        return sorted(map(tuple, cells.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1).tolist()))

    for image, before in zip(found, pixels, strict=True):
        assert not torch.equal(image, before) and patches(image) == patches(before)


@pytest.mark.parametrize("patch", [0, 3, 8, 16])
def test_patches_that_do_not_fit_are_refused(patch):
    with pytest.raises(UserError, match="patches"):
        ood.shuffled(smooth_images(2, side=8), patch)
