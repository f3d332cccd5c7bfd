"""What is timed: images, and a model of the paper's sizes with weights that move."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mrcnf.errors import UserError
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.paper_field import PaperField
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, ModelConfig

FIELD = FieldConfig(kind="paper", width=64, depth=1, blocks=2)


@dataclass
class Workload:
    """One run's images and model, and how they were made (for the JSON)."""

    model: MultiResolutionFlow
    x: Tensor
    log_q: Tensor
    batch: int
    about: dict[str, object]

    @property
    def device(self) -> torch.device:
        return self.x.device

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        return self.x[:n], self.log_q[:n]


def images(resolution: int, count: int) -> tuple[Tensor, str]:
    """uint8 (count, 3, R, R), and where they come from."""
    try:
        from mrcnf import data

        if resolution == 32:
            with suppress(UserError):  # not on this machine
                return data.load("cifar10", limit=count).pixels, "cifar10, first images of train"
        grey = data.load("photos", resolution=resolution).pixels[:, 0]
    except (ImportError, UserError):  # a bare machine: no Pillow, no PyWavelets
        return _clouds(resolution, count), "synthetic: random waves, 1/f spectrum"
    grey = grey[torch.arange(count) % len(grey)]
    shifted = [grey.roll(shift, -1) for shift in (0, 1, -1)]
    return torch.stack(shifted, 1), "photos, grey crops, channels shifted by 0, 1, -1 pixels"


def _clouds(resolution: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.fft.rfft2(torch.randn(count, 3, resolution, resolution, generator=generator))
    rows = torch.fft.fftfreq(resolution)[:, None]
    columns = torch.fft.rfftfreq(resolution)[None]
    field = torch.fft.irfft2(spectrum / (rows.square() + columns.square()).sqrt().clamp_min(0.02))
    scaled = field / field.std((2, 3), keepdim=True) * 50 + 128
    return scaled.clamp(0, 255).to(torch.uint8)


def paper_model(device: str, batch: int, steps: int, count: int = 512) -> Workload:
    """The paper's three levels of 8, 16 and 32, two blocks each: 509,604 parameters."""
    torch.manual_seed(0)
    found, source = images(32, max(count, batch))
    config = ModelConfig(channels=3, base="logit", whiten=False)  # as published
    model = MultiResolutionFlow([Level(config, r, FIELD) for r in config.resolutions])
    x, log_q = dequantise(found, generator=torch.Generator().manual_seed(0))
    for level in model:
        level.fit_standardisation(x)
        awaken(level)
    model, x, log_q = model.to(device), x.to(device), log_q.to(device)
    for level in model:
        train(level, x, steps)
    model.train()
    parameters = sum(p.numel() for p in model.parameters())
    weights = f"scaled random weights, then {steps} steps of flow matching split over two blocks"
    return Workload(
        model, x, log_q, batch, {"data": source, "weights": weights, "parameters": parameters}
    )


def single_level(resolution: int, device: str, count: int) -> tuple[Level, Tensor, Tensor]:
    """A detail level of any resolution, awake but untrained, and images for it."""
    torch.manual_seed(0)
    found, _ = images(resolution, max(count, 16))
    config = ModelConfig(resolutions=(resolution // 2, resolution), channels=3, whiten=False)
    level = Level(config, resolution, FIELD)
    x, log_q = dequantise(found, generator=torch.Generator().manual_seed(0))
    level.fit_standardisation(x)
    awaken(level)
    return level.to(device).train(), x[:count].to(device), log_q[:count].to(device)


@torch.no_grad()
def awaken(level: Level) -> None:
    """Weights at which the field does something: PyTorch's own leave it a constant for long.

    Hidden weights keep the size of signals through softplus, biases take off its mean.
    """
    for field in _fields(level):
        for i, layer in enumerate(field.layers):
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            weight = layer.weight[:, 1:]
            gain = 0.3 if i == len(field.layers) - 1 else 1.5
            weight.normal_(std=gain / math.sqrt(weight[0].numel()))
            layer.bias.zero_() if i == 0 else layer.bias.copy_(-0.8 * weight.sum((1, 2, 3)))


def train(level: Level, x: Tensor, steps: int, batch: int = 16) -> None:
    """Flow matching of several blocks: each takes its share of the straight path to noise."""
    fields = _fields(level)
    optimiser = torch.optim.Adam(level.parameters(), 2e-3)
    for _ in range(steps):
        values, coarse = level.coefficients(x[torch.randint(len(x), (batch,)).to(x.device)])
        y, _ = level.standardise(values)
        z = torch.randn(y.shape).to(y)
        loss = y.new_zeros(())
        for i, field in enumerate(fields):
            t = torch.rand(batch).to(y)
            at = ((i + t) / len(fields))[:, None, None, None]
            predicted = field(t, torch.lerp(y, z, at), level.condition(coarse))
            loss = loss + (predicted - (z - y) / len(fields)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()


def one_block(level: Level) -> Level:
    """The same level with its first block alone."""
    single = copy.deepcopy(level)
    single.flow = ContinuousFlow(_fields(single)[:1], level.flow.name)
    single.field = replace(single.field, blocks=1)
    return single


def _fields(level: Level) -> list[PaperField]:
    assert isinstance(level.flow, ContinuousFlow)
    return [field for field in level.flow if isinstance(field, PaperField)]
