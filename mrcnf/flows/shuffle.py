"""Shuffles: in which order channels stand before the last half of them leaves a split flow.

All are permutations: log|det| is 0 and the inverse is exact. The order is that of a weight per
channel; those of the largest weight leave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mrcnf.errors import UserError
from mrcnf.flows.base import Lift

REGULARISER = 1e-3
"""Weight of the published regulariser (arXiv 2407.04958)."""
SOFTNESS = 0.1
"""Temperature of the relaxed sorting that gradients go through."""


class Shuffle(nn.Module, ABC):
    """A permutation of channels, the same for all positions of an image.

    Args:
        channels: how many, a multiple of 4.
        coarse_channels: of the coarse image, 0 without one.
    """

    measured = False
    """Whether the order is measured on data, by `measure`."""

    def __init__(self, channels: int, coarse_channels: int = 0) -> None:
        super().__init__()
        self.channels = channels

    @abstractmethod
    def order(self, y: Tensor, condition: Tensor | None) -> Tensor:
        """Where each channel comes from: (channels,) or (N, channels), whole numbers.

        y may be shuffled already: nothing that an order depends on is moved by it.
        """

    def forward(self, y: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """y (N, channels, H, W) in order, and what to add to the loss (N,), or None."""
        return permute(y, self.order(y, condition)), None

    def invert(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The y that `forward` shuffles to z."""
        return permute(z, self.order(z, condition).argsort(-1))

    def measure(self, y: Tensor) -> None:
        """Set the order from data y, where it is measured."""


class NoShuffle(Shuffle):
    """The channels as they are."""

    def order(self, y: Tensor, condition: Tensor | None) -> Tensor:
        return torch.arange(self.channels, device=y.device)


class StoredShuffle(Shuffle):
    """One order for all images, kept with the weights; at first the channels' own."""

    fixed: Tensor

    def __init__(self, channels: int, coarse_channels: int = 0) -> None:
        super().__init__(channels)
        self.register_buffer("fixed", torch.arange(channels))

    def order(self, y: Tensor, condition: Tensor | None) -> Tensor:
        return self.fixed


class RandomShuffle(StoredShuffle):
    """An order drawn once, when the flow is made."""

    def __init__(self, channels: int, coarse_channels: int = 0) -> None:
        super().__init__(channels)
        self.fixed.copy_(torch.randperm(channels))


class EntropyShuffle(StoredShuffle):
    """By the measured differential entropy of each channel: those of the largest leave."""

    measured = True

    def measure(self, y: Tensor) -> None:
        self.fixed.copy_(entropy(y).argsort(stable=True))


class LearnedShuffle(StoredShuffle):
    """The Shuffle of EIW-Flow (arXiv 2407.04958), its divergence put right.

    A network of a constant gives the channels weights w (softmax), the same for all images; the
    order is theirs. A squeeze-and-excitation branch gives each image weights v of its own, and
    1e-3 · KL(v ‖ w) is added to the loss. Published, the divergence takes w where it wants
    log w. Sorting gives w no gradient, and here as there the regulariser is all that it has; so
    w and v learn of each other alone, and nothing of the likelihood.

    The order that was trained with is kept as such: weights that are nearly equal may change
    places when they are rounded.
    """

    def __init__(self, channels: int, coarse_channels: int = 0) -> None:
        super().__init__(channels)
        self.weights = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        squeezed = max(channels // 4, 1)
        self.excitation = nn.Sequential(
            nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels)
        )
        self._sort()

    def log_weights(self) -> Tensor:
        """log w, (channels,)."""
        ones = next(self.weights.parameters()).new_ones(self.channels)
        return self.weights(ones).log_softmax(-1)

    @torch.no_grad()
    def _sort(self) -> None:
        self.fixed.copy_(self.log_weights().argsort(stable=True))

    def forward(self, y: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if not self.training:
            return super().forward(y, condition)
        self._sort()
        shuffled, _ = super().forward(y, condition)
        own = self.excitation(y.mean((2, 3))).log_softmax(-1)
        divergence = (own.exp() * (own - self.log_weights())).sum(-1)
        return shuffled, REGULARISER * divergence


class ContextShuffle(Shuffle):
    """An order of each image's own, from the coarse image: it depends on features *and* inverts.

    Without a coarse image it is read off a quarter of the channels, the first ones, which always
    stay; only the others are shuffled. A network makes the channels' weights from means and
    mean squares.

    Sorting has no gradient. Backwards, the permutation counts as SoftSort's relaxation of it
    (Prillo & Eisenschlos 2020, eq. 5), a matrix whose rows are softmax(-|sorted w - w|/τ): the
    likelihood pulls w to where a channel in another place would have been likelier. To y, and to
    what w are read off, the permutation is the hard one, whose derivative is itself.
    """

    def __init__(self, channels: int, coarse_channels: int = 0) -> None:
        super().__init__(channels)
        self.fixed = 0 if coarse_channels else channels // 4
        read = coarse_channels or self.fixed
        moved = channels - self.fixed
        self.network = nn.Sequential(nn.Linear(2 * read, 32), nn.SiLU(), nn.Linear(32, moved))

    def weights(self, y: Tensor, condition: Tensor | None) -> Tensor:
        """(N, moved channels)."""
        # Laid out alike, or sums would differ in their last digit from where they are undone.
        read = (y[:, : self.fixed] if condition is None else condition).detach().contiguous()
        means = torch.cat((read.mean((2, 3)), read.square().mean((2, 3))), 1)
        # In full precision: training and use must agree on the order.
        with torch.autocast(y.device.type, enabled=False):
            return self.network(means.to(next(self.network.parameters()).dtype))

    def order(self, y: Tensor, condition: Tensor | None) -> Tensor:
        moved = self.fixed + self.weights(y, condition).argsort(dim=-1, stable=True)
        first = torch.arange(self.fixed, device=y.device).expand(len(y), -1)
        return torch.cat((first, moved), 1)

    def forward(self, y: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        weights = self.weights(y, condition)
        order = weights.argsort(dim=-1, stable=True)
        first, rest = y.tensor_split([self.fixed], dim=1)
        moved = permute(rest, order)
        if weights.requires_grad:
            soft = soft_permutation(weights.float())
            # Its value is 0; its gradient is the relaxed permutation's.
            slope = torch.einsum("nij,njhw->nihw", soft - soft.detach(), rest.detach().float())
            moved = moved + slope.to(moved.dtype)
        return torch.cat((first, moved), 1), None


class Reordering(Lift):
    """A shuffle as a step."""

    def __init__(self, shuffle: Shuffle, condition: Tensor | None) -> None:
        self.shuffle, self.condition = shuffle, condition

    @torch.no_grad()
    def lift(self, y: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return permute(y, self.shuffle.order(y, self.condition))

    @torch.no_grad()
    def drop(self, z: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return self.shuffle.invert(z, self.condition)


KINDS: dict[str, Callable[[int, int], Shuffle]] = {
    "none": NoShuffle,
    "random": RandomShuffle,
    "learned": LearnedShuffle,
    "entropy": EntropyShuffle,
    "context": ContextShuffle,
}
SHUFFLES = tuple(KINDS)


def build(kind: str, channels: int, coarse_channels: int = 0) -> Shuffle:
    """A shuffle by name, of `SHUFFLES`."""
    if kind not in KINDS:
        raise UserError(f"unknown shuffle {kind!r}; choose one of {', '.join(SHUFFLES)}")
    return KINDS[kind](channels, coarse_channels)


def permute(y: Tensor, order: Tensor) -> Tensor:
    """The channels of y (N, C, H, W) in an order (C,), or one of each image's own (N, C)."""
    if order.dim() == 1:
        return y[:, order]
    return y.gather(1, order[:, :, None, None].expand_as(y))


def soft_permutation(weights: Tensor) -> Tensor:
    """SoftSort's relaxation (N, C, C) of the matrix that sorts weights (N, C), smallest first."""
    ranked = weights.sort(dim=-1, stable=True).values
    distance = (ranked[:, :, None] - weights[:, None, :]).abs()
    return (-distance / SOFTNESS).softmax(-1)


def entropy(y: Tensor) -> Tensor:
    """Differential entropy (C,) of each channel of y (N, C, H, W), in nats, over images and
    positions together.

    From spacings between every √n-th of the n ordered values (Vasicek 1976), without the
    correction of a bias that vanishes with n.
    """
    values = y.detach().movedim(1, 0).flatten(1).double().sort(1).values
    n = values.shape[1]
    m = max(1, round(n**0.5))
    above = torch.cat((values[:, m:], values[:, -1:].expand(-1, min(m, n))), 1)
    below = torch.cat((values[:, :1].expand(-1, min(m, n)), values[:, :-m]), 1)
    return ((above - below).clamp_min(1e-12) * n / (2 * m)).log().mean(1)
