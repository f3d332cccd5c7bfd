"""Images of any size in files as small as a model's likelihoods say, and back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mrcnf.codec.decoder import decompress
from mrcnf.codec.encoder import Coded, encode
from mrcnf.codec.settings import LevelSettings, Settings
from mrcnf.model.model import MultiResolutionFlow

__all__ = ["Coded", "LevelSettings", "Settings", "compress", "decompress", "encode"]


def compress(
    model: MultiResolutionFlow,
    images: Sequence[Tensor] | Tensor,
    *,
    names: Sequence[str] | None = None,
    steps: int | None = None,
    settings: Settings | None = None,
    portable: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> bytes:
    """The bytes of a file from which `decompress` gets the images back; see `encode`."""
    return encode(
        model, images, names=names, steps=steps, settings=settings, portable=portable,
        bound=False, workers=workers, progress=progress,
    ).data  # fmt: skip
