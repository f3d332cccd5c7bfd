"""Which settings of the code suit a trained model, found on a few of its training images.

Every trial codes the same images with the same noise at full accuracy, and every level keeps what
made its own share smaller. No trial takes more network calls than the defaults do: what a better
rule for the middle of a step needs, it takes from the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mrcnf.codec import blocks
from mrcnf.codec.ans import CodingError, Stack
from mrcnf.codec.blocks import Block, Group, Size
from mrcnf.codec.lane import decoding
from mrcnf.codec.pyramid import coder_of, total, untold
from mrcnf.codec.settings import STEPS, LevelSettings, default, fitting
from mrcnf.errors import UserError
from mrcnf.model.model import MultiResolutionFlow

Change = Callable[[LevelSettings], LevelSettings]

HALVES = {"euler": STEPS, "midpoint": STEPS // 2}
"""Steps of equal cost: the midpoint rule takes four network calls where Euler's takes two."""
SPACINGS = (1.5, 2.0, 2.5, 3.0)
FACTORS = (0.5, 2.0)
"""Of the noise."""
_DEPTH = 64  # bits on the stack per dimension


def tune(
    model: MultiResolutionFlow,
    images: Sequence[Tensor],
    resolutions: Collection[int] | None = None,
    *,
    report: Callable[[float], object] | None = None,
) -> tuple[dict[int, LevelSettings], dict[int, tuple[float, float]]]:
    """Settings for every level, from a few images uint8 (C, H, W) of one size.

    Args:
        resolutions: of the levels whose settings may change; all by default.
        report: is told the share of the trials that is over.

    Returns:
        the settings by resolution, and for each level the bits per dimension of the image that the
        defaults and the settings that were found take, all levels coded with them.

    Raises:
        UserError: the images cannot be coded.
    """
    usual, changes = dict(default(model).levels), list(_changes())
    best, free = dict(usual), set(usual if resolutions is None else resolutions)
    with decoding(model) as own:
        first = _spent(own, best, images)
        if first is None:
            raise UserError("the model cannot code its training images; train it further first")
        spent = first
        for done, change in enumerate(changes, 1):
            trial = {r: change(kept) if r in free else kept for r, kept in best.items()}
            found = None if trial == best else _spent(own, trial, images)
            for resolution, bits in (found or {}).items():
                if bits < spent[resolution]:
                    best[resolution] = trial[resolution]
                    spent = {**spent, resolution: bits}
            if report is not None:
                report(done / len(changes))
        # Trials had one lattice for all levels, which is that of the finest noise among them.
        last = _spent(own, best, images)
    if last is None or sum(last.values()) > sum(first.values()):
        best, last = usual, first
    return best, {resolution: (first[resolution], last[resolution]) for resolution in best}


def _changes() -> Iterator[Change]:
    """One after another, each tried from what is best so far."""
    for method, steps in HALVES.items():
        yield lambda own, m=method, n=steps: replace(own, method=m, steps=n)  # type: ignore[misc]
    for spacing in SPACINGS:
        yield lambda own, s=spacing: replace(own, spacing=s)  # type: ignore[misc]
    for factor in FACTORS:
        yield lambda own, f=factor: replace(own, sigma=own.sigma * f)  # type: ignore[misc]
    for factor in FACTORS:
        yield lambda own, f=factor: replace(own, growth=own.growth * f)  # type: ignore[misc]


def _spent(
    model: MultiResolutionFlow, levels: dict[int, LevelSettings], images: Sequence[Tensor]
) -> dict[int, float] | None:
    """Bits per dimension of the image by level; None: these settings cannot code them."""
    settings = fitting(levels)
    size = Size(*images[0].shape[1:])
    group = Group(tuple(range(len(images))), size.padded(model.multiple))
    dims = len(images) * model.config.channels * group.size.height * group.size.width

    def gather(block: Block) -> Tensor:
        return blocks.gather(images, block, model.config.channels)

    try:
        pushed = coder_of(model, settings).push(Stack.deep(_DEPTH * dims), [group], gather, untold)
    except CodingError:
        return None
    found = total(tally.spent for tally in pushed.tallies)
    return {resolution: bits / dims for resolution, bits in found.items()}


def chosen(images: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """Some images of many (N, C, H, W), at random."""
    return list(images[torch.randperm(len(images), generator=generator)[:count]])
