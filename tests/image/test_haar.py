"""The Haar transform: PyWavelets' up to scale, exactly invertible, of determinant ±1."""

import math

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrcnf.errors import UserError
from mrcnf.image import haar

SHAPES = [(1, 1, 2, 2), (2, 1, 4, 6), (1, 3, 8, 2), (3, 2, 6, 4), (2, 3, 16, 16)]
# Each coefficient is a sum of four products: a dozen roundings.
ROUNDING = {torch.float32: 2e-6, torch.float64: 4e-15}


def images(shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_undoes_split(shape, dtype):
    x = images(shape, dtype)
    back = haar.merge(*haar.split(x))
    assert back.dtype == dtype
    torch.testing.assert_close(back, x, rtol=0, atol=10 * ROUNDING[dtype])


@pytest.mark.parametrize("shape", SHAPES)
def test_split_undoes_merge(shape):
    n, c, h, w = shape
    detail, coarse = images((n, 3 * c, h, w)), images((n, c, h, w))
    detail_back, coarse_back = haar.split(haar.merge(detail, coarse))
    torch.testing.assert_close(detail_back, detail, rtol=0, atol=1e-14)
    torch.testing.assert_close(coarse_back, coarse, rtol=0, atol=1e-14)


def pyramid(x, levels):
    """Details from the finest to the coarsest, and the coarsest image."""
    details = []
    for _ in range(levels):
        detail, x = haar.split(x)
        details.append(detail)
    return details, x


@pytest.mark.parametrize("levels", range(5))
def test_merging_again_and_again_undoes_a_pyramid(levels):
    x = images((2, 3, 16, 32))
    details, back = pyramid(x, levels)
    assert [d.shape[1:] for d in details] == [(9, 8 >> i, 16 >> i) for i in range(levels)]
    for detail in reversed(details):
        back = haar.merge(detail, back)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 4, 4), (2, 4, 2), (3, 2, 4)])
def test_the_determinant_of_split_is_one(shape):
    def flat(x):
        detail, coarse = haar.split(x.reshape(1, *shape))
        return torch.cat((detail.flatten(), coarse.flatten()))

    x = images(math.prod(shape))
    jacobian = torch.autograd.functional.jacobian(flat, x)
    assert torch.linalg.slogdet(jacobian).logabsdet.abs() < 1e-13


def test_the_determinant_of_a_pyramid_is_one():
    def flat(x):
        details, coarse = pyramid(x.reshape(1, 1, 8, 8), 3)
        return torch.cat([part.flatten() for part in (*details, coarse)])

    jacobian = torch.autograd.functional.jacobian(flat, images(64))
    assert torch.linalg.slogdet(jacobian).logabsdet.abs() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_pywavelets_agrees(shape):
    x = images(shape)
    detail, coarse = haar.split(x)
    approximation, bands = pywt.dwt2(x.numpy(), "haar")
    np.testing.assert_allclose(coarse.numpy(), approximation / 2, atol=1e-14)
    # Band-major: all channels of cH, then of cV, then of cD.
    expected = np.concatenate(bands, axis=1) * 2 / 2 ** (2 / 3)
    np.testing.assert_allclose(detail.numpy(), expected, atol=1e-14)


def test_details_are_band_major():
    x = torch.zeros(1, 3, 2, 2)
    x[0, 1] = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # rows differ, in channel 1 alone
    detail, _ = haar.split(x)
    assert detail.flatten().nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("function", [haar.split, haar.means, lambda x: haar.lift(x.int())])
@pytest.mark.parametrize("size", [(3, 4), (4, 7), (5, 5), (1, 1), (0, 2)])
def test_odd_sizes_are_refused_by_name(function, size):
    with pytest.raises(UserError, match=f"{size[0]}×{size[1]}"):
        function(torch.zeros(1, 1, *size))


@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4), (1, 1, 1, 4, 4)])
def test_other_than_four_dimensions_are_refused(shape):
    with pytest.raises(UserError, match=r"\(N, C, H, W\)"):
        haar.split(torch.zeros(shape))


@pytest.mark.parametrize("inverse", [haar.merge, haar.unlift])
@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (1, 6, 4, 4), (2, 3, 4, 4), (1, 3, 4, 2)])
def test_details_of_another_image_are_refused(inverse, shape):
    with pytest.raises(UserError, match=r"\(1, 1, 4, 4\)"):
        inverse(torch.zeros(shape, dtype=torch.int32), torch.zeros(1, 1, 4, 4, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_integer_images_do_not_overflow(dtype):
    x = torch.randint(100, 256, (2, 3, 8, 8)).to(dtype)
    detail, coarse = haar.split(x)
    expected_detail, expected = haar.split(x.double())
    torch.testing.assert_close(detail.double(), expected_detail, rtol=0, atol=1e-4)
    torch.testing.assert_close(coarse.double(), expected, rtol=0, atol=0)
    assert torch.equal(haar.means(x), coarse)


@pytest.mark.parametrize("memory", ["transposed", "channels last"])
def test_memory_layout_does_not_matter(memory):
    x = images((2, 3, 8, 8))
    y = x.mT.contiguous().mT if memory == "transposed" else x.to(memory_format=torch.channels_last)
    assert not y.is_contiguous()
    for a, b in zip(haar.split(x), haar.split(y), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_split_and_merge():
    x = images((1, 2, 4, 4)).requires_grad_()
    assert torch.autograd.gradcheck(haar.split, (x,))
    detail, coarse = images((1, 6, 2, 2)).requires_grad_(), images((1, 2, 2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(haar.merge, (detail, coarse))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("times", range(5))
def test_means_are_the_pyramids_bit_for_bit(times, dtype):
    x = torch.rand(4, 3, 32, 32, dtype=dtype)
    assert torch.equal(haar.means(x, times), pyramid(x, times)[1])


def test_lift_is_one_to_one_on_every_small_patch():
    values = torch.arange(-4, 5, dtype=torch.int32)
    patches = torch.cartesian_prod(*[values] * 4).reshape(-1, 1, 2, 2)
    detail, coarse = haar.lift(patches)
    assert torch.equal(haar.unlift(detail, coarse), patches)
    codes = torch.cat((detail, coarse), dim=1).flatten(1)
    assert len(codes.unique(dim=0)) == len(patches)


def test_lift_is_onto():
    values = torch.arange(-3, 4, dtype=torch.int32)
    codes = torch.cartesian_prod(*[values] * 4).reshape(-1, 4, 1, 1)
    detail, coarse = codes[:, :3], codes[:, 3:]
    detail_back, coarse_back = haar.lift(haar.unlift(detail, coarse))
    assert torch.equal(detail_back, detail) and torch.equal(coarse_back, coarse)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    bound=st.sampled_from([1, 255, 30_000, 2**28]),
    seed=st.integers(0, 2**30),
)
def test_lift_and_split_invert_for_any_image(shape, bound, seed):
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(
        -bound, bound + 1, (n, c, 2 * h, 2 * w), generator=generator, dtype=torch.int32
    )
    assert torch.equal(haar.unlift(*haar.lift(x)), x)
    back = haar.merge(*haar.split(x.double()))
    torch.testing.assert_close(back, x.double(), rtol=0, atol=1e-14 * bound)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_lifted_bytes_are_bytes_near_the_mean(dtype):
    corners = torch.cartesian_prod(*[torch.tensor([0, 1, 2, 127, 128, 253, 254, 255])] * 4)
    x = corners.reshape(-1, 1, 2, 2).to(dtype)
    detail, coarse = haar.lift(x)
    assert detail.dtype == coarse.dtype == dtype
    assert coarse.min() >= 0 and coarse.max() <= 255
    below = x.double().mean((2, 3), keepdim=True) - coarse
    assert below.min() >= 0 and below.max() <= 1  # two floors in a row, half a unit each


def test_lifted_details_are_the_scaled_details():
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.int32)
    lifted = haar.lift(x)[0].double().chunk(3, dim=1)
    exact = haar.split(x.double())[0].chunk(3, dim=1)
    for integer, band, scale in zip(lifted, exact, (0.5, 0.5, 1.0), strict=True):
        assert (integer - band * haar.SCALE * scale).abs().max() <= 0.5 + 1e-12


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_lift_refuses_what_cannot_hold_differences(dtype):
    with pytest.raises(UserError, match="signed integers"):
        haar.lift(torch.zeros(1, 1, 2, 2, dtype=dtype))
