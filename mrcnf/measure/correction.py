"""Bits of many steps at the price of few: a difference that few images suffice for.

What few steps are off by hardly varies from image to image. So all images are solved in few
steps, some in many too, and the mean difference of those is added: the two-level case of
multilevel Monte Carlo (Giles 2008, Operations Research 56(3)). Its error is measured, not bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mrcnf.errors import UserError
from mrcnf.flows.solve import Solver
from mrcnf.model.level import Level

PILOT = 16
"""Images that it is found out with how many steps, and on how many images, are best."""
SHARES = (5, 3, 2)
"""Few steps are one in so many."""

Bits = Callable[[Tensor, Mapping[int, Solver]], Tensor]
"""From uint8 images (N, C, H, W) and solvers by level to bits per dimension, (levels, N)."""


@dataclass
class Plan:
    """Few steps for all images, and images that show what these are off by."""

    few: dict[int, Solver]
    """By level, of those that are solved."""
    chosen: Tensor
    """Indices (S,) of the images that are solved in many steps too."""
    differences: Tensor
    """(levels, S): many steps' bits per dimension less few steps', on the same noise and probes."""


def plan(
    levels: Sequence[Level], images: Tensor, bits: Bits, tolerance: float
) -> Plan | None:
    """The cheapest way to a standard error of the correction of about the tolerance.

    Args:
        levels: with their own solvers, whose bits are wanted.
        images: uint8 (N, C, H, W).
        bits: per dimension, with the same noise for the same images.
        tolerance: in bits per dimension.

    Returns:
        None where solving all images in many steps costs no more.

    Raises:
        UserError: no tolerance, or levels whose solvers have no number of steps.
    """
    if not 0 < tolerance < math.inf:
        raise UserError(f"evaluate.tolerance must be above 0 and finite, got {tolerance}")
    many = {level.resolution: level.solver for level in levels if level.flow.solved}
    if not many or not all(solver.steps for solver in many.values()):
        raise UserError(
            "evaluate.tolerance is for flows that are solved in a number of steps, which this run "
            "has not; leave it out, or set solver.steps > 0"
        )
    pilot = _spread(len(images), PILOT)
    reference, best = bits(images[pilot], many), (float(len(images)), 0, dict[int, Solver]())
    for share in SHARES:
        few = {r: replace(solver, steps=-(-solver.steps // share)) for r, solver in many.items()}
        deviation = float((reference - bits(images[pilot], few)).sum(0).std())
        needed = max(PILOT, math.ceil((deviation / tolerance) ** 2))
        best = min(best, (len(images) / share + needed * (1 + 1 / share), needed, few),
                   key=lambda found: found[0])  # fmt: skip
    _, needed, few = best
    if not few:
        return None
    chosen = _spread(len(images), needed)
    differences = bits(images[chosen], many) - bits(images[chosen], few)
    return Plan(few, chosen, differences)


def _spread(n: int, count: int) -> Tensor:
    """Indices of so many of n images, evenly."""
    return torch.linspace(0, n - 1, min(count, n)).round().long()
