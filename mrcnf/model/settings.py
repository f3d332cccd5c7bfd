"""What a model and the networks of its levels are told."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from mrcnf import plugins
from mrcnf.errors import UserError
from mrcnf.flows import multiscale, paths, shuffle
from mrcnf.flows.fields import FIELDS
from mrcnf.image import noise, pyramids

BASES = ("affine", "logit")
FLOWS = ("continuous", "coupling")
DEQUANTISATIONS = (*noise.NOISES, "variational")


@dataclass(frozen=True)
class ModelConfig:
    """What a model is told; its levels may differ in `whiten` alone."""

    resolutions: tuple[int, ...] = (8, 16, 32)
    """Side of each level's images in pixels, coarsest (the base) first, each twice the last."""
    channels: int = 0
    """Channels of the images: 1 or 3; 0 takes the data's."""
    nbits: int = 8
    """Bits per pixel and channel that are modelled; fewer drop the low bits."""
    pyramid: str = "exact"
    """From an image to a coarser one: exact means, or integer ones, each level by itself."""
    dequantisation: str = "uniform"
    """Noise in the cells: uniform, gaussian, or variational (learned: by the finest level in what
    leaves means as they are, or by every level of an integer pyramid)."""
    whiten: bool = True
    """Turn each level's channels to their principal axes before they are scaled to unit variance;
    false scales them as they are."""
    base: str = "affine"
    """Map of base pixels to the line: affine, or logit (α = 0.05)."""

    def __post_init__(self) -> None:
        r = self.resolutions
        if not r or r[0] < 1 or any(b != 2 * a for a, b in pairwise(r)):
            raise UserError(
                f"model.resolutions {list(r)}: each level must be twice the one before, "
                "e.g. [8, 16, 32]"
            )
        if not 1 <= self.nbits <= 8:
            raise UserError(f"model.nbits must be from 1 to 8, got {self.nbits}")
        if self.pyramid not in pyramids.PYRAMIDS:
            raise UserError(
                f"model.pyramid {self.pyramid!r}: choose one of {', '.join(pyramids.PYRAMIDS)}"
            )
        if self.dequantisation not in DEQUANTISATIONS:
            raise UserError(
                f"model.dequantisation {self.dequantisation!r}: choose one of "
                f"{', '.join(DEQUANTISATIONS)}"
            )
        if self.base not in BASES:
            raise UserError(f"model.base {self.base!r}: choose one of {', '.join(BASES)}")

    @property
    def pixel_noise(self) -> str:
        """The kind of `noise.dequantise`: levels bend uniform noise to variational."""
        return "gaussian" if self.dequantisation == "gaussian" else "uniform"

    @property
    def finest(self) -> int:
        return self.resolutions[-1]


@dataclass(frozen=True)
class FieldConfig:
    """The velocity network of one level."""

    kind: str = "residual"
    """residual (the default), paper (four 3×3 convolutions, softplus), or MODULE:OBJECT, a class of
    your own, which is told its `options` instead of what follows."""
    width: int = 48
    """Channels of the hidden layers."""
    depth: int = 4
    """Residual blocks (the paper's field has a fixed depth)."""
    blocks: int = 1
    """Fields in sequence, each over its own t ∈ [0, 1]; flow matching takes 1."""
    scales: int = 1
    """More make the residual field a U: `depth` blocks at each scale on the way down and again on
    the way up, each scale twice as wide on half the side."""
    attention: bool = False
    """Self-attention after each block of the residual field's smallest scale."""
    path: str = "straight"
    """Path from data to noise that flow matching follows: straight or variance-preserving."""
    lattice: bool = False
    """Show the residual field where on the lattice of integers each pixel is: at the finest level,
    or at every level of an integer pyramid. Means of pixels blur their lattice too much."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a field of your own."""

    def __post_init__(self) -> None:
        _check_own("field", self, FIELDS, ("width", "depth", "scales", "attention", "lattice"))
        if min(self.width, self.depth, self.scales, self.blocks) < 1:
            raise UserError(
                "field.width, field.depth, field.scales and field.blocks must be at least 1"
            )
        if self.path not in paths.PATHS:
            raise UserError(f"field.path {self.path!r}: choose one of {', '.join(paths.PATHS)}")
        if self.kind == "paper" and (self.scales > 1 or self.attention or self.lattice):
            raise UserError(
                "field.scales, field.attention and field.lattice are the residual field's alone"
            )


@dataclass(frozen=True)
class FlowConfig:
    """The flow of one level; `FieldConfig` has its networks."""

    kind: str = "continuous"
    """continuous (a velocity field and an ODE), coupling (affine couplings: exact, trained by
    likelihood), or MODULE:OBJECT, a class of your own, which is told its `options`."""
    couplings: int = 4
    """Couplings in sequence, at each scale of a split flow."""
    splits: int = 0
    """How often half of the channels leave, the sides halved each time; 0: a plain flow."""
    shuffle: str = "none"
    """Which channels leave: none (the last ones), random (a fixed order), learned (EIW-Flow's),
    entropy (those of the largest measured entropy) or context (by each image's coarse image)."""
    prior: str = "normal"
    """Of what leaves: normal (standard), or conditional on what stays."""
    reorder_every: int = 200
    """Steps between measurements of the entropy order, in the first half of training; what was
    measured last is kept."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a flow of your own."""

    def __post_init__(self) -> None:
        _check_own("flow", self, FLOWS, ("couplings",))
        for name, value, known in (
            ("shuffle", self.shuffle, shuffle.SHUFFLES),
            ("prior", self.prior, multiscale.PRIORS),
        ):
            if value not in known:
                raise UserError(f"flow.{name} {value!r}: choose one of {', '.join(known)}")
        if min(self.couplings, self.reorder_every) < 1 or self.splits < 0:
            raise UserError(
                "flow.couplings and flow.reorder_every must be at least 1, flow.splits at least 0"
            )
        for name, value, plain in (
            ("shuffle", self.shuffle, "none"),
            ("prior", self.prior, "normal"),
        ):
            if value != plain and not self.splits:
                raise UserError(
                    f"flow.{name} = {value} is of split flows; set flow.splits to 1 or more"
                )

    def __str__(self) -> str:
        name = f"coupling × {self.couplings}" if self.kind == "coupling" else self.kind
        if not self.splits:
            return f"{name} flow"
        return f"{name} flow, {self.splits} splits (shuffle {self.shuffle}, prior {self.prior})"


def _check_own(
    section: str,
    settings: FieldConfig | FlowConfig,
    known: tuple[str, ...],
    theirs: tuple[str, ...],
) -> None:
    """A UserError unless a section's kind and what it is told go together.

    Args:
        known: kinds that there are.
        theirs: settings that those are told, and a user's own is not.
    """
    if settings.kind in known:
        if settings.options:
            raise UserError(
                f"{section}.options are of a {section} of your own; {section}.kind is "
                f"{settings.kind}"
            )
        return
    if not plugins.is_own(settings.kind):
        raise UserError(
            f"{section}.kind {settings.kind!r}: choose one of {', '.join(known)}, {plugins.OWN}"
        )
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if setting.name in theirs and value != setting.default:
            raise UserError(
                f"{section}.{setting.name} = {value} is not told to {settings.kind}; leave it out, "
                f"or say it in [{section}.options]"
            )
