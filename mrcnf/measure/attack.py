"""Images altered so that a model's code for them grows: an attack that knows the model.

Within an L∞ ball of ε grey levels around each image, projected gradient ascent on its bits per
dimension (Madry et al. 2018, for code lengths as in arXiv 2208.12716). The gradient is that of
the very bound that is evaluated, through its solver, at integer images, with new noise and
probes at every step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mrcnf import runtime, seeds
from mrcnf.errors import UserError
from mrcnf.image.bits import bits_per_dim
from mrcnf.image.noise import check_images, dequantise
from mrcnf.image.straight import roundings_pass
from mrcnf.measure.ascent import STRIDE, ascend
from mrcnf.measure.evaluate import bits_by_level
from mrcnf.model.level import Level, check_size, likelihoods

MINIMISING_STRIDE = 0.25
"""The same where few bits are wanted: typical images lie close together, large steps miss them."""


@dataclass
class AttackResult:
    """What became of images."""

    pixels: Tensor
    """uint8 (N, C, H, W): no pixel further than ε from where it was."""
    trajectory: list[float]
    """Bits per dimension met at each step, before it, on the step's own noise: mean over images
    and restarts."""
    step_size: float
    """The first step, in grey levels."""
    seconds: float


def attack(
    levels: Iterable[Level],
    images: Tensor,
    *,
    epsilon: int,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    draws: int = 1,
    minimise: bool = False,
    batch: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> AttackResult:
    """Images within ε grey levels of the given ones that cost as many bits as can be found.

    The first start is the image itself, others are drawn in the ball; what is kept, image by
    image, is the best of their ends, of the image itself and of it under a `checkerboard`, on
    noise of its own. Solver and trace are each level's own.

    Args:
        levels: a model, or some of its levels, whose bits count.
        images: uint8 (N, C, H, W).
        epsilon: of the ball, 1 to 255.
        steps: gradients per restart; every one costs an evaluation and its backward pass.
        step_size: the first step in grey levels, `STRIDE`·ε or `MINIMISING_STRIDE`·ε by default;
            they shrink as `ascend` says.
        restarts: starts.
        draws: noise draws that a gradient is the mean of, and that ends are compared on.
        minimise: find images that cost few bits instead.
        batch: images at once, whose solves must fit into memory with their gradients.
        seed: of starts, noise and probes.
        progress: show a bar on stderr.

    Raises:
        UserError: a number out of its range, or images that are not such as the model is of.
    """
    levels = list(levels)
    check([epsilon], steps, step_size, restarts, draws, batch)
    check_images(images, levels[0].model.channels)
    check_size(levels, images.shape[2:])
    started, sign = time.perf_counter(), -1 if minimise else 1
    default = MINIMISING_STRIDE if minimise else STRIDE
    stride = default * epsilon if step_size is None else step_size
    rank, world = runtime.rank_and_world()
    chunks = list(images.split(batch))
    found = torch.zeros(restarts, *images.shape)
    trajectory = torch.zeros(steps, dtype=torch.float64)
    bar = tqdm(total=restarts * steps * len(images), desc=f"attack, ε = {epsilon}", unit="gradient",
               disable=not progress or rank > 0)  # fmt: skip
    with bar, _frozen(levels):
        for restart in range(restarts):
            for b, chunk in enumerate(chunks):
                if b % world != rank:
                    continue
                own = seeds.seed_of(seed, 0, f"attack {epsilon}/{restart}/{b}")
                generator = seeds.generator(own, levels[0].device)
                met: list[float] = []

                def slope(
                    pixels: Tensor, generator: torch.Generator = generator,
                    met: list[float] = met,
                ) -> Tensor:  # fmt: skip
                    bits, gradient = bits_and_gradient(levels, pixels, draws, generator)
                    met.append(float(bits.sum()))
                    bar.update(len(pixels) * world)
                    return sign * gradient

                attacked = ascend(
                    chunk.to(levels[0].device), slope, epsilon=epsilon, steps=steps,
                    step_size=stride, generator=generator, scatter=restart > 0,
                )  # fmt: skip
                found[restart, b * batch : b * batch + len(chunk)] = attacked.cpu()
                trajectory += torch.tensor(met, dtype=torch.float64)
    if world > 1:
        found, trajectory = (
            runtime.sum_over_processes(tensor, levels[0].device) for tensor in (found, trajectory)
        )
    known = torch.stack((images.cpu(), checkerboard(images, epsilon)))
    candidates = torch.cat((known, found.to(torch.uint8)))
    judge = seeds.seed_of(seed, 0, "ends") % 10**12
    ends = [
        bits_by_level(levels, pixels, batch=batch, draws=draws, seed=judge).sum(0)
        for pixels in candidates
    ]
    best = (sign * torch.stack(ends)).argmax(0)
    return AttackResult(
        candidates[best, torch.arange(len(images))],
        (trajectory / (restarts * len(images))).tolist(),
        stride,
        time.perf_counter() - started,
    )


def bits_and_gradient(
    levels: list[Level], images: Tensor, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Bits per dimension of uint8 images, (N,), and their gradient by x: means of some draws.

    Roundings on the way, of pyramids and learned noise, have the gradients of what they round.
    """
    model, dims = levels[0].model, images[0].numel()
    total, gradients = torch.zeros(len(images), dtype=torch.float64), 0.0 * images
    for _ in range(draws):
        x, log_q = dequantise(
            images, nbits=model.nbits, kind=model.pixel_noise, generator=generator
        )
        x.requires_grad_()
        with torch.enable_grad(), roundings_pass():
            parts = likelihoods(levels, x, log_q, generator=generator)
            log_prob = torch.stack([part.log_prob for part in parts.values()]).sum(0)
            bits = bits_per_dim(log_prob, dims)
        (gradient,) = torch.autograd.grad(bits.sum(), x)
        total += bits.detach().double().cpu() / draws
        gradients = gradients + gradient / draws
    return total, gradients


def random_signs(images: Tensor, epsilon: int, seed: int = 0) -> Tensor:
    """Every pixel moved by +ε or -ε, and no further than its range: uint8 (N, C, H, W)."""
    check([epsilon])
    generator = seeds.generator(seeds.seed_of(seed, 0, f"signs {epsilon}"))
    signs = 2 * torch.randint(0, 2, images.shape, generator=generator) - 1
    return (images.cpu() + epsilon * signs).clamp(0, 255).to(torch.uint8)


def checkerboard(images: Tensor, epsilon: int) -> Tensor:
    """Neighbouring pixels, and neighbouring channels, moved by ε in opposite directions.

    The highest frequency in space and in colour, of which photographs have least; ascent from an
    image need not find it.

    Returns:
        uint8 (N, C, H, W), within the range of pixels.
    """
    channel, row, column = (torch.arange(size) for size in images.shape[1:])
    odd = (channel[:, None, None] + row[:, None] + column) % 2
    return (images.cpu() + epsilon * (1 - 2 * odd)).clamp(0, 255).to(torch.uint8)


def check(
    epsilons: Sequence[int],
    steps: int = 1,
    step_size: float | None = None,
    restarts: int = 1,
    draws: int = 1,
    batch: int = 1,
) -> None:
    """A UserError for numbers that `attack` cannot have."""
    if not epsilons:
        raise UserError("no epsilon to attack with; name at least one, e.g. --epsilon 4")
    for epsilon in epsilons:
        if not 1 <= epsilon <= 255 or epsilon != int(epsilon):
            raise UserError(
                f"epsilon must be a whole number of grey levels from 1 to 255, got {epsilon}"
            )
    counts = {"steps": steps, "restarts": restarts, "draws": draws, "batch": batch}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} of an attack must be at least 1, got {count}")
    if step_size is not None and not 0 < step_size < math.inf:
        raise UserError(f"the step size must be above 0 and finite, got {step_size}")


@contextlib.contextmanager
def _frozen(levels: Iterable[Level]) -> Iterator[None]:
    """Within: the weights want no gradients, which would cost time and memory."""
    wanting = [p for level in levels for p in level.parameters() if p.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_()
