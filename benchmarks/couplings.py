"""A training step of a coupling level against flow matching of a field of as many parameters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.steps import likelihood_step, match_step
from benchmarks.timing import alternate, compare, peak_bytes
from benchmarks.workload import images
from mrcnf.flows.solve import Solver
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.model.settings import FieldConfig, FlowConfig, ModelConfig

Row = dict[str, object]
MODEL = ModelConfig((16, 32), channels=3)
PAIRS = (
    # Couplings, blocks of each one's network, width of all networks; blocks of the field.
    (2, 2, 48, 3),
    (4, 2, 32, 7),
    (8, 1, 32, 8),
)
"""Of as many parameters to 7 %, and equal widths: multiples of 16, as others are padded to them."""


def coupling_rows(device: str, batch: int, repeats: int) -> list[Row]:
    """Level 32, untrained: couplings by likelihood, a residual field by flow matching."""
    found, _ = images(32, max(batch, 64))
    x, log_q = dequantise(found, generator=torch.Generator().manual_seed(0))
    small = x[:batch].to(device), log_q[:batch].to(device)
    return [_row(pair, x, *small, repeats) for pair in PAIRS]


def _row(
    pair: tuple[int, int, int, int], many: Tensor, x: Tensor, log_q: Tensor, repeats: int
) -> Row:
    couplings, blocks, width, depth = pair
    flow, network = FlowConfig("coupling", couplings=couplings), FieldConfig(width=width)
    level = _level(flow, replace(network, depth=blocks), many, x.device)
    field = _level(FlowConfig(), replace(network, depth=depth), many, x.device)
    works = {
        "reference": partial(match_step, field, x),
        "ours": partial(likelihood_step, level, x, log_q, Solver()),
    }
    seconds = alternate(works, x.device, repeats)  # type: ignore[arg-type]
    return {
        "work": "coupling_step",
        "name": f"level 32: {couplings} couplings × {blocks} blocks, width {width}",
        **compare(seconds["reference"], seconds["ours"]),
        "peak_bytes": peak_bytes(works["ours"], x.device),
        "reference_peak_bytes": peak_bytes(works["reference"], x.device),
        "images": len(x),
        "nfe": 1,
        "level_parameters": parameters(level),
        "reference_parameters": parameters(field),
        "settings": "exact likelihood",
        "reference_settings": f"residual field of {depth} blocks; flow matching",
    }


def parameters(level: Level) -> int:
    return sum(p.numel() for p in level.parameters())


def _level(flow: FlowConfig, field: FieldConfig, x: Tensor, device: torch.device) -> Level:
    torch.manual_seed(0)
    level = Level(MODEL, 32, field, flow=flow)
    level.fit_standardisation(x)
    return level.to(device).train()
