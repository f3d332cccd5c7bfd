"""Multi-resolution continuous normalizing flows.

>>> import mrcnf
>>> model = mrcnf.load("runs/demo")  # doctest: +SKIP
>>> model.bits_per_dim(images)       # doctest: +SKIP
"""

import importlib
from typing import Any

from mrcnf.errors import UserError
from mrcnf.flows import trace
from mrcnf.flows.base import Flow, FlowResult, Step
from mrcnf.flows.continuous import ContinuousFlow
from mrcnf.flows.coupling import CouplingFlow
from mrcnf.flows.multiscale import MultiscaleFlow
from mrcnf.flows.solve import Solver, SolverError
from mrcnf.flows.trace import Trace
from mrcnf.flows.velocity import Field
from mrcnf.image import haar
from mrcnf.model.level import Level
from mrcnf.model.model import MultiResolutionFlow
from mrcnf.model.settings import FieldConfig, FlowConfig, ModelConfig
from mrcnf.runs.checkpoint import load
from mrcnf.runs.config import Config

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ContinuousFlow",
    "CouplingFlow",
    "Field",
    "FieldConfig",
    "Flow",
    "FlowConfig",
    "FlowResult",
    "Level",
    "ModelConfig",
    "MultiResolutionFlow",
    "MultiscaleFlow",
    "Solver",
    "SolverError",
    "Step",
    "Trace",
    "UserError",
    "data",
    "evaluate",
    "haar",
    "load",
    "trace",
    "train",
]

# Loaded when first asked for: they want Pillow and tqdm, which a machine that only loads and
# samples models may lack.
_LATER = {
    "data": ("mrcnf.data", ""),
    "evaluate": ("mrcnf.measure.evaluate", "evaluate"),
    "train": ("mrcnf.training.levels", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'mrcnf' has no attribute {name!r}")
    where, what = _LATER[name]
    module = importlib.import_module(where)
    return getattr(module, what) if what else module
