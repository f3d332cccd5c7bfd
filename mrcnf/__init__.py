"""Multi-resolution continuous normalizing flows.

>>> import mrcnf
>>> model = mrcnf.load("runs/demo")  # doctest: +SKIP
>>> model.bits_per_dim(images)       # doctest: +SKIP
"""

from mrcnf import haar, pixels, trace
from mrcnf.checkpoint import load
from mrcnf.errors import UserError
from mrcnf.flow import ContinuousFlow, Trace
from mrcnf.level import FieldConfig, Level, ModelConfig
from mrcnf.model import MultiResolutionFlow
from mrcnf.solve import Solver, SolverError

__version__ = "0.1.0"

__all__ = [
    "ContinuousFlow",
    "FieldConfig",
    "Level",
    "ModelConfig",
    "MultiResolutionFlow",
    "Solver",
    "SolverError",
    "Trace",
    "UserError",
    "haar",
    "load",
    "pixels",
    "trace",
]
