"""Tiny models, images and generators that the tests of models share."""

import torch
from fields import awake

from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, ModelConfig

EXACT = Trace("exact")
RK4 = Solver("rk4", steps=10)


def build(resolutions=(2, 4), channels=1, size=0.1, solver=RK4, field=None, **model):
    """A model with random weights, its moments fitted to random images, in double precision."""
    config = ModelConfig(resolutions=resolutions, channels=channels, **model)
    field = field or FieldConfig(kind="paper", width=4)
    levels = [Level(config, r, field, solver, Trace("exact")) for r in resolutions]
    model = awake(MultiResolutionFlow(levels), size)
    x, _ = dequantise(
        images(64, config), nbits=config.nbits, kind=config.pixel_noise, dtype=torch.float64
    )
    for level in model:
        level.fit_standardisation(x)
    return model


def images(n, config):
    side = config.finest
    return torch.randint(0, 256, (n, config.channels, side, side), dtype=torch.uint8)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def correlated(n, side):
    """Images (n, 3, side, side) in [0, 1] of unequal, correlated channels."""
    mixing = torch.tensor([[0.1, 0, 0], [0.3, 0.2, 0], [0.1, 0.5, 0.4]], dtype=torch.float64)
    independent = torch.rand(n, 3, side, side, dtype=torch.float64)
    return torch.einsum("ij,njhw->nihw", mixing, independent)
