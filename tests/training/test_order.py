"""The order of the images."""

import pytest

from mrcnf.training.order import EpochOrder


@pytest.mark.parametrize("batch", [3, 4, 5, 12, 31])
def test_each_epoch_visits_every_image_once(batch):
    order, seen = EpochOrder(12, batch, 0), []
    for step in range(3 * 12):
        indices = order.indices(step)
        assert len(indices) == batch
        seen += indices.tolist()
    epochs = [seen[i : i + 12] for i in range(0, 3 * 12 * batch, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    order.epoch = -1  # as after resuming
    assert order.indices(7).tolist() == seen[7 * batch : 8 * batch]
