"""The flow of a level, from its settings."""

from __future__ import annotations

from mrcnf.errors import UserError
from mrcnf.flows import fields
from mrcnf.flows.base import Flow
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.coupling import CouplingFlow
from mrcnf.flows.multiscale import MultiscaleFlow
from mrcnf.model.settings import FieldConfig, FlowConfig


def build_flow(
    flow: FlowConfig,
    field: FieldConfig,
    channels: int,
    coarse_channels: int = 0,
    lattice: int = 0,
    name: str = "flow",
) -> Flow:
    """The flow of so many channels, given so many of a coarse image.

    Args:
        lattice: pixels per position whose place on the lattice of integers fields are to see.
        name: what to call it in messages.

    Raises:
        UserError: the settings do not go together.
    """
    _check(flow, field, name)

    def single(channels: int, coarse_channels: int) -> Flow:
        if flow.kind == "coupling":
            return CouplingFlow(
                channels,
                coarse_channels,
                couplings=flow.couplings,
                width=field.width,
                depth=field.depth,
                scales=field.scales,
                attention=field.attention,
                name=name,
            )
        built = [
            fields.build(
                field.kind,
                channels,
                coarse_channels,
                width=field.width,
                depth=field.depth,
                scales=field.scales,
                attention=field.attention,
                path=field.path,
                lattice=lattice,
            )
            for _ in range(field.blocks)
        ]
        return ContinuousFlow(built, name)

    if not flow.splits:
        return single(channels, coarse_channels)
    return MultiscaleFlow(
        single,
        channels,
        coarse_channels,
        splits=flow.splits,
        shuffle=flow.shuffle,
        prior=flow.prior,
        name=name,
    )


def halvings(flow: FlowConfig, field: FieldConfig, channels: int) -> int:
    """How often the flow of so many channels halves its sides, which must allow it."""
    squeezes = flow.splits + 1 if flow.splits else int(flow.kind == "coupling" and channels == 1)
    return squeezes + field.scales - 1


def _check(flow: FlowConfig, field: FieldConfig, name: str) -> None:
    if field.lattice and (flow.kind != "continuous" or flow.splits):
        raise UserError(
            f"{name}: field.lattice is of continuous flows without splits; set it to false there"
        )
    if flow.kind != "coupling":
        return
    for setting, value, wanted in (
        ("kind", field.kind, "residual"),
        ("blocks", field.blocks, 1),
        ("path", field.path, "straight"),
    ):
        if value != wanted:
            raise UserError(
                f"{name}: field.{setting} = {value} is of continuous flows; with flow.kind = "
                f"coupling leave it {wanted}"
            )
