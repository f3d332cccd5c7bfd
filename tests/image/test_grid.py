"""Many images as one."""

import torch
from tiny import smooth_images

from mrcnf.image.grid import grid


def test_grids_tile_row_by_row():
    pixels = smooth_images(5, side=4)
    picture = grid(pixels, gap=2, zoom=3)
    assert picture.shape == (1, 2 * 14 + 2, 3 * 14 + 2)
    for k, image in enumerate(pixels):
        top, left = 2 + 14 * (k // 3), 2 + 14 * (k % 3)
        cell = picture[:, top : top + 12, left : left + 12]
        assert torch.equal(cell[:, ::3, ::3], image) and torch.equal(cell[:, 2::3, 1::3], image)
    assert (picture[:, :2] == 255).all() and (picture[:, 16:, 30:] == 255).all()
