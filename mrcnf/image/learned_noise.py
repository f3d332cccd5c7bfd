"""Learned noise in the cells of the integers: variational dequantisation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrcnf.image import haar

PAIRS = ((0, 1), (2, 3), (0, 2), (1, 3))
"""Corners of a patch, of `haar.patches`, whose noise is bent in pairs, in this order."""
_BESIDE = (
    ((2, 3), (0, 0, 1, -1)),
    ((0, 1), (0, 0, -1, 1)),
    ((1, 3), (1, -1, 0, 0)),
    ((0, 2), (-1, 1, 0, 0)),
)
"""For each pair, the corners beside it in the next patch above, below, to the left or right, and
the padding that puts that patch upon this one."""
_LINK = 4.0
"""Scale of the links: noise is small numbers, the logits that it moves are not."""


class Pass(NamedTuple):
    """One bend: of the two pixels of a pair, of one colour or of all, in every patch."""

    pair: int
    """Which of `PAIRS`."""
    group: int
    """Which group of colours, of one where noise is linked, else of all."""


class Bends(NamedTuple):
    """What `LearnedNoise` does to noise in given cells."""

    shift: Tensor
    """(N, bends, H, W); with pairs, colour by colour for each pair in turn."""
    log_slope: Tensor
    """Shaped as that."""
    links: tuple[Tensor, ...] = ()
    """For each of its bends, a quarter of what the noise around it (`Corners.around`) counts for
    its shift, (N, around, H, W); none at all where no noise is linked to other noise."""

    def to(self, dtype: torch.dtype) -> Bends:
        links = tuple(link.to(dtype) for link in self.links)
        return Bends(self.shift.to(dtype), self.log_slope.to(dtype), links)

    def of(self, corners: Corners, step: Pass) -> tuple[Tensor, Tensor]:
        """Shift and log-slope of a pass, (N, colours, H, W) each."""
        number = step.pair * corners.groups + step.group
        parts = len(PAIRS) * corners.groups
        shift, slope = (part.chunk(parts, 1)[number] for part in (self.shift, self.log_slope))
        if self.links:
            # One after the other: the order of a sum must be the same on all machines.
            around = corners.around(step)
            for link, noise in zip(self.links[number].split(1, 1), around, strict=True):
                shift = shift + _LINK * link * noise
        return shift, slope


class LearnedNoise(nn.Module):
    """Uniform noise u in each cell bent to u' = σ(a + e^b·logit u), with a, b from the integers.

    log p(x + u') + log du'/du bounds log P of the integers for every a and b (Ho et al. 2019,
    Flow++, §3.1, whose noise comes from a flow; this is one logistic per coefficient). It
    starts at a = b = 0, which leaves u as it is.

    With `pairs` the mean of the noise of every 2×2 patch of pixels stays what it was, and with
    it every exact mean, so the coarser levels see nothing of it: of two pixels with
    u1 + u2 = s, u1 has the interval from max(0, s - 1) to min(1, s), and its place in there is
    bent as above. The rows of a patch are bent one after the other, then its columns, colour by
    colour. Then a also depends, linearly, on the noise that such a pass leaves as it is: of the
    patch's other pixels, of the pair's sum, and of the pixels beside the pair in the next patch,
    with weights from the integers too. So the noise of neighbours and of colours is correlated,
    as it is given an image, and the Jacobian of each pass is triangular, with the bends' slopes on
    its diagonal.

    Args:
        channels: of the coefficients that the integers make.
        coarse_channels: of the coarse image, 0 for a base level.
        pairs: how many channels the pixels have, whose noise is bent in pairs; 0 bends the noise
            of each coefficient by itself.
        width: channels of the two hidden layers.
    """

    def __init__(
        self, channels: int, coarse_channels: int, pairs: int = 0, width: int = 32
    ) -> None:
        super().__init__()
        self.pairs, self.width = pairs, width
        self.bent = len(PAIRS) * pairs if pairs else channels
        self.linked = bool(pairs)
        self.net = nn.Sequential(
            nn.Conv2d(channels + coarse_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            self._last(),
        )
        self.register_load_state_dict_pre_hook(_as_it_was_saved)

    def _last(self) -> nn.Conv2d:
        links = self.bent * count_around(self.pairs) if self.linked else 0
        last = nn.Conv2d(self.width, 2 * self.bent + links, 1)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return last

    def forward(self, u: Tensor, y: Tensor, coarse: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bend the noise u, in [0, 1).

        Args:
            u: noise of the coefficients (N, C, H, W), or with `pairs` of the pixels
                (N, pairs, 2H, 2W).
            y: the coefficients of the cells' centres, standardised (N, C, H, W).
            coarse: the coarse image, standardised.

        Returns:
            u', in [0, 1), and log|∂u'/∂u| (N,) in nats.
        """
        bends = self.bends(y, coarse)
        bends = bends.to(u.dtype)
        if not self.pairs:
            bent, log_rise = bend(u, bends.shift, bends.log_slope)
            return bent, log_rise.flatten(1).sum(1)
        corners, total = Corners(u, self.linked), torch.zeros_like(u[:, 0, 0, 0])
        below_one = 1 - torch.finfo(u.dtype).eps  # which rounding might reach
        for step in corners.passes():
            one, other = corners.pair(step)
            shift, log_slope = bends.of(corners, step)
            both = one + other
            low, size = (both - 1).clamp_min(0), torch.minimum(both, 2 - both)
            place = (one - low) / size.clamp_min(torch.finfo(u.dtype).tiny)
            place, log_rise = bend(place, shift, log_slope)
            one = (low + size * place).clamp(0, below_one)
            corners.set(step, one, (both - one).clamp(0, below_one))
            total = total + log_rise.flatten(1).sum(1)
        return corners.whole(), total

    def bends(self, y: Tensor, coarse: Tensor | None) -> Bends:
        """What `forward` does, given the noise."""
        seen = y if coarse is None else torch.cat((y, coarse), 1)
        answer = self.net(seen)
        shift, log_slope = answer[:, : 2 * self.bent].chunk(2, 1)
        links = answer[:, 2 * self.bent :]
        return Bends(
            shift, log_slope, links.split(count_around(self.pairs), 1) if self.linked else ()
        )


class Corners:
    """Noise of pixels (N, colours, 2H, 2W), taken apart and put together again patch by patch.

    Args:
        linked: whether each colour is bent by itself.
        cell: the width of a cell in the noise's units.
        middle: the mean of uniform noise in those.
    """

    def __init__(
        self, noise: Tensor, linked: bool, cell: float = 1.0, middle: float = 0.5
    ) -> None:
        self.groups = noise.shape[1] if linked else 1
        self.cell, self.middle = cell, middle
        self.planes = [list(corner.chunk(self.groups, 1)) for corner in haar.patches(noise)]
        """For each corner and group, (N, colours of the group, H, W)."""

    def passes(self) -> list[Pass]:
        """The bends, in turn."""
        return [Pass(pair, group) for pair in range(len(PAIRS)) for group in range(self.groups)]

    def pair(self, step: Pass) -> tuple[Tensor, Tensor]:
        """The two pixels that a pass is about."""
        one, other = PAIRS[step.pair]
        return self.planes[one][step.group], self.planes[other][step.group]

    def set(self, step: Pass, one: Tensor, other: Tensor) -> None:
        for corner, plane in zip(PAIRS[step.pair], (one, other), strict=True):
            self.planes[corner][step.group] = plane

    def around(self, step: Pass) -> list[Tensor]:
        """What a pass of one colour leaves as it is, less its mean, in cells.

        The patch's other pixels, corner by corner; the sum of the pair; and the pixels beside the
        pair in the next patch, 0 beyond the image's edge.
        """
        seen = [
            plane - self.middle
            for corner, planes in enumerate(self.planes)
            for group, plane in enumerate(planes)
            if group != step.group or corner not in PAIRS[step.pair]
        ]
        one, other = self.pair(step)
        seen.append(one + other - 2 * self.middle)
        corners, padding = _BESIDE[step.pair]
        for corner in corners:
            seen.append(F.pad(self.planes[corner][step.group] - self.middle, padding))
        return [noise / self.cell for noise in seen]

    def whole(self) -> Tensor:
        return haar.interleave(*(torch.cat(planes, 1) for planes in self.planes))


def count_around(colours: int) -> int:
    """How many numbers `Corners.around` gives."""
    return 4 * colours + 1


def _as_it_was_saved(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Files of earlier versions have no links: such noise goes without."""
    assert isinstance(module, LearnedNoise)
    saved = state.get(f"{prefix}net.4.weight")
    if saved is not None and module.pairs:
        linked = len(saved) != 2 * module.bent
        if linked != module.linked:
            module.linked = linked
            module.net[-1] = module._last().to(module.net[0].weight)  # type: ignore[arg-type]


def bend(u: Tensor, shift: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
    """σ(shift + e^log_slope·logit u) and the log of its derivative by u, element by element."""
    edge = torch.finfo(u.dtype).eps
    logit = u.clamp(edge, 1 - edge).logit()
    bent = shift + log_slope.exp() * logit
    log_rise = log_slope + _log_density(bent) - _log_density(logit)
    return bent.sigmoid().clamp(edge, 1 - edge), log_rise


def unbend(bent: Tensor, shift: Tensor, log_slope: Tensor) -> Tensor:
    """The u that `bend` takes there."""
    edge = torch.finfo(bent.dtype).eps
    logit = bent.clamp(edge, 1 - edge).logit()
    return ((logit - shift) * (-log_slope).exp()).sigmoid()


def _log_density(x: Tensor) -> Tensor:
    """log of σ(x)·(1 - σ(x)), the logistic density."""
    return F.logsigmoid(x) + F.logsigmoid(-x)
