"""Velocity fields and flows that the tests share."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from mrcnf.flows.tangents import Dual
from mrcnf.flows.trace import Known
from mrcnf.flows.velocity import Field

Module = TypeVar("Module", bound=nn.Module)


class LinearField(Field):
    """dy/dt = A y + b: everything about it is known in closed form."""

    knows_jacobian = True

    def __init__(self, matrix: Tensor, offset: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())
        self.offset = None if offset is None else nn.Parameter(offset.clone())

    def run(self, t: Tensor, y: Dual, context: Tensor | None) -> Dual:
        def apply(x: Tensor) -> Tensor:
            return (x.flatten(1) @ self.matrix.T).reshape(x.shape)

        bias = None if self.offset is None else self.offset.reshape(y.value.shape[1:])
        return y.linear(apply, bias)

    def push_known(
        self, t: Tensor, y: Tensor, tangents: Tensor, context: Tensor | None
    ) -> Known:
        value, pushed = self.push(t, y, tangents, context)
        return Known(value, pushed, pushed, self.matrix.trace().expand(len(y)))


def awake(module: Module, size: float = 0.15, seed: int = 1) -> Module:
    """In double precision, with every parameter nudged: last layers of zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += size * noise
    return module


def matrix(dims: int, seed: int = 0, size: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(dims, dims, generator=generator, dtype=torch.float64)
