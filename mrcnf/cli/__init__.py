"""The command line: `mrcnf`, and `python -m mrcnf` for torchrun."""

from mrcnf.cli.app import main

__all__ = ["main"]
