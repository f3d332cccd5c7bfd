"""Every test starts from the same random numbers."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

# Everything here is tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

with warnings.catch_warnings():
    # The first torch.func.jvp of a process compiles with torch.jit, which PyTorch deprecates.
    warnings.simplefilter("ignore")
    torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

# benchmarks/ is not installed; appended, so that an installed mrcnf comes before the checkout's.
sys.path.append(str(Path(__file__).parents[1]))
