"""Fits what codecs and traces ask of a trained level: its Jacobian near the diagonal.

On points of the level's own paths from training images to noise, the head `NearDiagonal` of each
field learns to say what J·e is, for random signs e, from the features of the network alone. The
steps of a code that end at t = u^2 are longer the later they are, and errors of J count with
their lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mrcnf import seeds
from mrcnf.codec.settings import LevelSettings
from mrcnf.data.datasets import Images
from mrcnf.errors import UserError
from mrcnf.flows.near_diagonal import NearDiagonal
from mrcnf.flows.residual_field import ResidualField
from mrcnf.flows.solve import Solver, solve
from mrcnf.flows.tangents import Dual
from mrcnf.flows.velocity import Conditioned
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level
from mrcnf.runs.calibration import fields_of
from mrcnf.runs.images import match_model

BATCH = 32
TIMES = 16
"""Points of each path that are learnt from."""
SPACING = LevelSettings.spacing
_RATE = 4e-3


def calibrate(
    level: Level,
    images: Images,
    *,
    steps: int = 600,
    seed: int = 0,
    report: Callable[[float, float], object] | None = None,
) -> float:
    """Fit heads to a level, on training images; all but the heads stays as it is.

    Args:
        steps: of Adam, of 32 images each; minutes on one core for a level of 32×32.
        report: is told the share of them that is over, and of ‖J·e‖² that is not explained.

    Returns:
        the share of ‖J·e‖² that is not explained, over the last tenth of the steps.

    Raises:
        UserError: the level has no field that such a head belongs to.
    """
    fields = fields_of(level)
    if not fields:
        raise UserError(
            f"level {level.resolution} has no residual field, the only kind to calibrate: it is "
            "coded as it is"
        )
    match_model(level.model, images)
    generator = seeds.generator(seeds.seed_of(seed, level.resolution, "calibration"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        heads = [field.new_near().to(level.device) for field in fields]
    weights = [p for head in heads for p in head.parameters()]
    optimizer = torch.optim.Adam(weights, _RATE)
    step, left = 0, []
    while step < steps:
        points = _points(level, images, generator)
        for batch in range(TIMES):
            if step == steps:
                break
            over = step / steps
            optimizer.param_groups[0]["lr"] = _RATE * max(0.02, 1 - over) * min(1, step / 20 + 0.1)
            wrong = whole = torch.zeros((), device=level.device)
            for field, head, (times, states, condition) in zip(fields, heads, points, strict=True):
                places = torch.arange(BATCH)
                chosen = (places + batch) % TIMES
                t, y = times[chosen].to(states), states[chosen, places]
                missed, all_of_it = _loss(field, head, t, y, condition, generator)
                wrong, whole = wrong + missed, whole + all_of_it
            optimizer.zero_grad()
            wrong.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            left.append(float(wrong.detach() / whole))
            if report is not None:
                report(step / steps, left[-1])
    for field, head in zip(fields, heads, strict=True):
        field.near = head.requires_grad_(False)
    last = left[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _loss(
    field: ResidualField, head: NearDiagonal, t: Tensor, y: Tensor, condition: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The mean square of what a head misses of J·e, and of J·e, in a step's lengths."""
    with torch.no_grad():
        signs = torch.randint(0, 2, y.shape, generator=generator).to(y) * 2 - 1
        context = field.context(condition)
        seen, rates = field.features(t, Dual(y, signs[None]), context)
        assert rates.tangents is not None
        target = rates.tangents[0]
        # Steps at t = u^p are p·u^(p-1) long.
        length = (SPACING * t ** (1 - 1 / SPACING)).reshape(-1, 1, 1, 1)
    found = head.product(head(*seen), signs)
    return (length * (found - target)).square().mean(), (length * target).square().mean()


@torch.no_grad()
def _points(
    level: Level, images: Images, generator: torch.Generator
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """For each field: random times (TIMES,), the paths there (TIMES, BATCH, …), the condition."""
    model = level.model
    chosen = torch.randint(len(images), (BATCH,), generator=generator)
    x, _ = dequantise(
        images.take(chosen), nbits=model.nbits, kind=model.pixel_noise, generator=generator
    )
    y, condition, _ = level.prepare(x.to(level.noise))
    found = []
    for field in fields_of(level):
        velocity = Conditioned(field, condition)
        offset = torch.rand((), generator=generator)
        times = ((torch.arange(TIMES) + offset) / TIMES) ** SPACING
        states, now = [], 0.0
        for t in [*times.tolist(), 1.0]:
            (y,), _ = solve(
                lambda at, state, f=velocity: (f(at, state[0]),),  # type: ignore[misc]
                (y,), Solver("midpoint", steps=1), now, t,
            )  # fmt: skip
            states.append(y)
            now = t
        found.append((times, torch.stack(states[:-1]), condition))
    return found
