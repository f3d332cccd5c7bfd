"""How the tests of runs compare tensors and expect refusals."""

import pytest
import torch

from mrcnf.errors import UserError


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def refused(path, call):
    with pytest.raises(UserError) as error:
        call()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)
