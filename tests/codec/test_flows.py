"""Every kind of flow codes: what decodes is what was coded, of the size that its bits promise."""

import pytest
import torch
from fields import awake

from mrcnf import codec
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, FlowConfig, ModelConfig

COUPLING = {"kind": "coupling", "couplings": 2}
INTEGER = {"pyramid": "integer", "dequantisation": "variational"}
MODELS = {
    "couplings": ((4, 8), COUPLING, {}),
    "couplings of integers": ((4, 8), COUPLING, INTEGER),
    "split couplings": ((8,), {**COUPLING, "splits": 1, "shuffle": "random"}, {}),
    "split couplings, conditional": (
        (8,), {**COUPLING, "splits": 1, "shuffle": "context", "prior": "conditional"}, {},
    ),
    "split couplings in levels": ((4, 8), {**COUPLING, "splits": 1, "shuffle": "context"}, {}),
    "split couplings of one channel": ((8,), {**COUPLING, "splits": 1}, {"channels": 1}),
    "split, continuous": ((8,), {"splits": 1, "shuffle": "learned"}, {}),
}  # fmt: skip


def build(name):
    resolutions, flow, model = MODELS[name]
    torch.manual_seed(0)
    config = ModelConfig(resolutions, **{"channels": 3, **model})
    field = FieldConfig(width=6, depth=1)
    levels = [Level(config, r, field, flow=FlowConfig(**flow)) for r in resolutions]
    side, channels = resolutions[-1], config.channels
    images = torch.randint(0, 256, (64, channels, side, side), dtype=torch.uint8)
    x, _ = dequantise(images)
    for level in levels:
        level.fit_standardisation(x)
    return awake(MultiResolutionFlow(levels), 0.05).float().eval().requires_grad_(False), images


SLOW = ("split couplings in levels", "split, continuous")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS],
)
def test_images_come_back_from_files_of_the_size_that_was_promised(name):
    model, images = build(name)
    images = images[: 8 if "continuous" in name or "levels" in name else 24]
    coded = codec.encode(model, images, steps=8)
    back = codec.decompress(model, coded.data)
    assert all(torch.equal(a, b) for a, b in zip(back, images, strict=True))
    assert coded.stored == 0
    # Couplings' steps are exact; of the continuous flow's there are few.
    assert abs(coded.excess_percent) < (2 if "continuous" in name else 0.3)
