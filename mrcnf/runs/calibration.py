"""What codecs and traces were taught about a trained level, in a file beside its weights.

    RUN/level-16/codec.safetensors     the heads `NearDiagonal` of the level's fields, and settings

It is no part of the model, whose densities are the same with it or without. Files are coded with
heads or without, as they were there, and are decoded with the same; settings are written into each
file.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mrcnf.errors import UserError
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.residual_field import ResidualField
from mrcnf.model.level import Level
from mrcnf.runs.tensors import read_tensors, write_tensors

HEADS = "codec.safetensors"


def fields_of(level: Level) -> list[ResidualField]:
    """The fields of a level that can have heads; none where its flow is of another kind."""
    if not isinstance(level.flow, ContinuousFlow):
        return []
    return [field for field in level.flow if isinstance(field, ResidualField)]


def save(folder: Path, level: Level) -> None:
    """Write the heads of a level, and the settings to code it with, into its folder."""
    tensors: dict[str, Tensor] = {}
    for i, field in enumerate(fields_of(level)):
        if field.near is not None:
            tensors |= {f"{i}.{name}": t for name, t in field.near.state_dict().items()}
    metadata = {"resolution": level.resolution, "settings": level.coding}
    write_tensors(folder / HEADS, tensors, metadata)


def detach(level: Level) -> None:
    """Take all of it off a level: what is left is what its file of weights holds."""
    level.coding = {}
    for field in fields_of(level):
        field.near = None


def attach(folder: Path, level: Level) -> None:
    """Give a level the heads and the settings that its folder holds, if any.

    Raises:
        UserError: they are damaged, or of another level.
    """
    path = folder / HEADS
    if not path.is_file():
        return
    tensors, metadata = read_tensors(path)
    fields = fields_of(level)
    heads = [field.new_near() for field in fields] if tensors else []
    expected = {
        f"{i}.{name}": t.shape
        for i, head in enumerate(heads)
        for name, t in head.state_dict().items()
    }
    if expected != {name: t.shape for name, t in tensors.items()}:
        raise UserError(f"{path} does not fit the level beside it; run `mrcnf calibrate` again")
    level.coding = dict(metadata.get("settings") or {})
    for i, (field, head) in enumerate(zip(fields, heads, strict=bool(tensors))):
        head.load_state_dict({name: tensors[f"{i}.{name}"].float() for name in head.state_dict()})
        field.near = head
