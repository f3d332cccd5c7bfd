"""The checked tensor file: safetensors, whose metadata explain it and whose checksum proves it.

The metadata are JSON under one key, beside the format's mark and a SHA-256 over that text and
every tensor's name, type, shape and bytes. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from mrcnf.errors import UserError
from mrcnf.files import write

FORMAT = "mrcnf-2"
"""The mark of the files that this version reads and writes."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors with JSON metadata and a checksum, atomically.

    Raises:
        UserError: it cannot be written; then what was there before still is.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(metadata)
    marks = {"format": FORMAT, "metadata": text, "sha256": _checksum(tensors, text)}
    write(path, save(tensors, marks))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: tensors, on the CPU, and metadata.

    Raises:
        UserError: missing, truncated, altered, or not one of this package's files.
    """
    with _opened(path) as (file, marks):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if marks.get("sha256") != _checksum(tensors, marks["metadata"]):
        raise UserError(f"{path} is damaged: its checksum does not match its contents")
    return tensors, json.loads(marks["metadata"])


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone, in no more time for a large file; the checksum is not verified.

    Raises:
        UserError: missing, truncated, or not one of this package's files.
    """
    with _opened(path) as (_, marks):
        return json.loads(marks["metadata"])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """The open file and its marks; whatever fails while it is open is a UserError."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            marks = {"metadata": "", **(file.metadata() or {})}
            _check_format(path, marks.get("format", ""))
            yield file, marks
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None


def _check_format(path: Path, found: str) -> None:
    if found != FORMAT and found.startswith("mrcnf-"):
        raise UserError(
            f"{path} is of the format {found!r}, this version reads {FORMAT!r}: train it again"
        )
    if found != FORMAT:
        raise UserError(f"{path} was not written by mrcnf (no {FORMAT!r} mark in its metadata)")


def _checksum(tensors: dict[str, Tensor], metadata: str) -> str:
    digest = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
