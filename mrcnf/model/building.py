"""The flow of a level, from its settings; a user's own is tried out first."""

from __future__ import annotations

import torch

from mrcnf import plugins
from mrcnf.errors import UserError
from mrcnf.flows import fields
from mrcnf.flows.base import Flow, FlowResult
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.coupling import CouplingFlow
from mrcnf.flows.multiscale import MultiscaleFlow
from mrcnf.flows.solve import Solver, SolverError
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
        if plugins.is_own(flow.kind):
            own = plugins.make(
                flow.kind, "flow.kind", Flow, channels, coarse_channels, options=flow.options  # type: ignore[type-abstract]
            )
            own.name = name
            return own
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
                options=field.options,
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


def _check(flow: FlowConfig, field: FieldConfig, name: str) -> None:
    if field.lattice and (flow.kind != "continuous" or flow.splits):
        raise UserError(
            f"{name}: field.lattice is of continuous flows without splits; set it to false there"
        )
    if plugins.is_own(flow.kind):
        if field != FieldConfig():
            raise UserError(
                f"{name}: [field] is not told to {flow.kind}; leave it out, or say it in "
                "[flow.options]"
            )
        return
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


@torch.no_grad()
def try_out(flow: Flow, kind: str, channels: int, coarse_channels: int, side: int) -> None:
    """Refuse a user's own flow, or one of a user's own field, whose answers do not fit.

    Args:
        kind: its name, for messages.
        side: of what it is tried on.

    Raises:
        UserError: it fails, answers in another shape or type, does not invert itself, or has no
            parameters.
    """
    y = torch.linspace(-1, 1, 2 * channels * side * side).reshape(2, channels, side, side)
    told = None
    if coarse_channels:
        told = torch.linspace(1, -1, 2 * coarse_channels * side * side)
        told = told.reshape(2, coarse_channels, side, side)
    solver, what = Solver("euler", steps=1), f"{kind}, tried on y of shape {tuple(y.shape)}"
    what += "" if told is None else f" and a coarse image of shape {tuple(told.shape)}"
    generator, training = torch.Generator().manual_seed(0), flow.training
    flow.eval()
    try:
        result = flow.log_prob(y, told, solver=solver, generator=generator)
        latent = flow.transport(y, told, solver=solver)
        back = flow.transport(latent, told, backwards=True, solver=solver)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except SolverError:  # one coarse step proves nothing
        return
    except Exception as error:
        raise UserError(f"{what}, failed: {plugins.place_of(error)}") from error
    finally:
        flow.train(training)
    if not isinstance(result, FlowResult) or result.log_prob.shape != (2,):
        found = (
            f"log_prob of shape {tuple(result.log_prob.shape)}"
            if isinstance(result, FlowResult)
            else f"a {type(result).__name__}"
        )
        raise UserError(f"{what}: log_prob() must answer an mrcnf.FlowResult, its log_prob of "
                        f"shape (2,); it answers {found}")  # fmt: skip
    for way, moved in (("there", latent), ("and back", back)):
        if getattr(moved, "shape", None) != y.shape:
            shape = tuple(getattr(moved, "shape", ())) or type(moved).__name__
            raise UserError(f"{what}: transport() {way} must keep the shape; it answers {shape}")
    if not flow.solved and (missed := float((back - y).abs().max())) > 1e-2:
        raise UserError(f"{what}: transport() backwards misses where it came from by {missed:.2g}")
    if not any(True for _ in flow.parameters()):
        raise UserError(f"{kind} has no parameters to train")
