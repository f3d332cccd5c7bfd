import numpy as np
import pytest
import torch
from small import noise, smooth

from mrcnf.codec import plain
from mrcnf.codec.ans import Stack

IMAGES = {
    "grey": smooth(3, 16),
    "colours": smooth(3, 16, 3),
    "noise": noise(2, 8, 3),
    "constants": torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 8, 8),
    "odd": smooth(1, 7, 3),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_come_back_and_need_no_bits_to_begin_with(name):
    images, stack = IMAGES[name].long(), Stack(np.ones(3, np.uint32))
    before = stack.words()
    plain.push_image(stack, images)
    assert stack.low == 1
    assert torch.equal(plain.pop_image(stack, tuple(images.shape)), images)
    assert (stack.words() == before).all()


def test_smooth_images_are_coded_in_fewer_bits_than_rough_ones():
    sizes = []
    for images in (IMAGES["constants"], smooth(20, 8, 3), IMAGES["noise"]):
        stack = Stack(np.ones(3, np.uint32))
        before = stack.bits()
        plain.push_image(stack, images.long())
        sizes.append((stack.bits() - before) / images.numel())
    assert sizes[0] < 0.5 and 5 < sizes[1] < 9 < sizes[2]
