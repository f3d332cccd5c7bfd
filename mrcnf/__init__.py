"""Multi-resolution continuous normalizing flows.

>>> import mrcnf
>>> model = mrcnf.load("runs/demo")  # doctest: +SKIP
>>> model.bits_per_dim(images)       # doctest: +SKIP
"""

from mrcnf import data
from mrcnf.errors import UserError
from mrcnf.flows import trace
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.solve import Solver, SolverError
from mrcnf.flows.trace import Trace
from mrcnf.image import haar
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, ModelConfig
from mrcnf.runs.checkpoint import load

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
    "data",
    "haar",
    "load",
    "trace",
]
