"""Which model a file was written with."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import torch

from mrcnf.model.model import MultiResolutionFlow


def identity(model: MultiResolutionFlow) -> bytes:
    """SHA-256 of all that decides what a model computes: 32 bytes."""
    digest = hashlib.sha256()
    digest.update(repr(sorted(asdict(model.config).items())).encode())
    for level in model:
        field = {key: value for key, value in asdict(level.field).items() if value != {}}
        digest.update(repr(sorted(field.items())).encode())  # no options: as it always was
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous()
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
