"""Two runs to report on; not to be changed."""

import pytest
from tiny import images, tiny

from mrcnf.training import trainer as train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, override in (("a", "train.beta2=0.99"), ("b", "train.beta2=0.5")):
        settings = tiny(override, "train.evaluate_every=2")
        for level in (2, 4):
            trainer = train.Trainer(settings, level, images(), folder / name, test=images(seed=1))
            trainer.run(progress=False)
    return [folder / "a", folder / "b"]
