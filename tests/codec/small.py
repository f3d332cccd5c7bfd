"""Small models and images that the codec's tests share."""

import torch
from fields import awake

from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, ModelConfig

PAPER = FieldConfig(kind="paper", width=4)


def model(resolutions=(2, 4), channels=1, size=0.1, field=PAPER, **config):
    """A model with random weights, in units of random images, single precision."""
    torch.manual_seed(0)
    config = ModelConfig(resolutions=resolutions, channels=channels, **config)
    levels = [Level(config, r, field, Solver("rk4", steps=10), Trace("exact")) for r in resolutions]
    made = awake(MultiResolutionFlow(levels), size)
    x, _ = dequantise(noise(64, config.finest, channels), dtype=torch.float64)
    for level in made:
        level.fit_standardisation(x)
    return made.float().eval().requires_grad_(False)


def noise(count, side, channels=1, seed=0):
    """Uniform noise, uint8 (count, channels, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8
    )


def smooth(count, side, channels=1, seed=0):
    """Noisy gradients."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(60, 180, side)
    rough = 8 * torch.randn(count, channels, side, side, generator=generator)
    level = 25 * torch.randn(count, 1, 1, 1, generator=generator)
    return (ramp + level + rough).clamp(0, 255).to(torch.uint8)
