"""The nearest images: those of brute force, exactly."""

import pytest
import torch

from mrcnf.measure.nearest import nearest


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_nearest_images_are_those_of_brute_force(k, chunk):
    generator = torch.Generator().manual_seed(2)
    among = torch.randint(256, (40, 3, 4, 4), generator=generator, dtype=torch.uint8)
    among[30:] = among[:10]  # equally near: the first comes first
    chosen = torch.randint(256, (6, 3, 4, 4), generator=generator, dtype=torch.uint8)
    chosen[0] = among[33]
    differences = chosen[:, None].long() - among[None].long()
    expected = differences.square().flatten(2).sum(2).sort(dim=1, stable=True).indices[:, :k]
    found = nearest(chosen, among, k, chunk=chunk)
    assert torch.equal(found, expected) and found[0, 0] == 3


def test_neighbours_of_extreme_images_are_exact():
    """Squared norms of 2·10⁸, beyond single precision's whole numbers, that differ by one."""
    among = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    among[0, 0, 0, 0] = among[1, 0, 0, 0] = 0
    image = among[:1].clone()
    image[0, 0, 0, 0] = 1
    among[0, 0, 0, 0] = 3
    assert nearest(image, among, 3).tolist() == [[1, 0, 2]]
