"""The order of the images."""

import pytest
from trainers import trainer_of


@pytest.mark.parametrize("batch", [3, 4, 5, 12, 31])
def test_each_epoch_visits_every_image_once(tmp_path, batch):
    trainer, seen = trainer_of(tmp_path, f"train.batch={batch}"), []
    for trainer.step_number in range(3 * 12):
        indices = trainer.order.indices(trainer.step_number)
        assert len(indices) == batch
        seen += indices.tolist()
    epochs = [seen[i : i + 12] for i in range(0, 3 * 12 * batch, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    trainer.step_number, trainer.order.epoch = 7, -1  # as after resuming
    assert trainer.order.indices(trainer.step_number).tolist() == seen[7 * batch : 8 * batch]
