"""Velocity fields by name: those that there are, and a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrcnf import plugins
from mrcnf.errors import UserError
from mrcnf.flows.paper_field import PaperField
from mrcnf.flows.residual_field import ResidualField
from mrcnf.flows.velocity import Field

FIELDS = ("residual", "paper")


def build(
    kind: str,
    channels: int,
    coarse_channels: int = 0,
    width: int = 48,
    depth: int = 4,
    scales: int = 1,
    attention: bool = False,
    path: str = "straight",
    lattice: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Field:
    """A field by name: "residual" (all but `options`), or "paper" (width of its three layers).

    The class of a name `module:object` is called with the channels and the `options`.
    """
    if plugins.is_own(kind):
        return plugins.make(
            kind, "field.kind", Field, channels, coarse_channels, options=options or {}
        )
    if kind == "residual":
        return ResidualField(
            channels,
            coarse_channels,
            width=width,
            depth=depth,
            scales=scales,
            attention=attention,
            path=path,
            lattice=lattice,
        )
    if kind == "paper":
        return PaperField(channels, coarse_channels, (width,) * 3)
    raise UserError(f"unknown velocity field {kind!r}; choose one of {', '.join(FIELDS)}")
