import pytest
import torch

from mrcnf.codec import lifting
from mrcnf.image import haar


def integers(*shape, bits=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**bits), 2**bits, shape, generator=generator)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("reflected", [False, True])
def test_rotations_are_near_their_matrix_and_undone_exactly(size, reflected):
    generator = torch.Generator().manual_seed(size)
    axes = torch.linalg.qr(
        torch.randn(size, size, generator=generator, dtype=torch.float64)
    ).Q
    if reflected:
        axes[0] *= -1
    turn, x = lifting.rotation(axes.float()), integers(2, size, 4, 5)
    turned = lifting.apply(turn, x)
    assert torch.equal(lifting.undo(turn, turned), x)
    exact = torch.einsum("ij,njhw->nihw", axes, x.double())
    assert (turned - exact).abs().max() < 6


def test_scalings_are_near_their_factors_and_undone_exactly():
    factors = [5.0, 0.2, 3.0, 1 / 9, 3.0]
    scale, x = lifting.scaling(factors), integers(2, 5, 4, 5)
    scaled = lifting.apply(scale, x)
    assert torch.equal(lifting.undo(scale, scaled), x)
    exact = x * torch.tensor(factors, dtype=torch.float64)[:, None, None]
    assert (scaled - exact).abs().max() < 20


def test_sums_are_the_haar_transform_and_undone_exactly():
    x = integers(3, 2, 6, 8)
    detail, coarse = lifting.sums(x)
    assert torch.equal(lifting.unsums(detail, coarse), x)
    exact, means = haar.split(x.double())
    assert torch.equal(coarse.double(), 4 * means)
    units = torch.tensor([2.0, 2.0, 4.0]).repeat_interleave(2)[:, None, None] / haar.SCALE
    assert (detail * units - exact).abs().max() < 2


def test_coarse_images_do_not_see_what_pixels_of_a_patch_trade():
    x = integers(1, 1, 2, 2)
    _, coarse = lifting.sums(x)
    for one, other in ((0, 1), (0, 2), (1, 3)):
        flat = x.flatten().clone()
        flat[one] += 1
        flat[other] -= 1
        assert torch.equal(lifting.sums(flat.reshape(1, 1, 2, 2))[1], coarse)
