"""Networks whose answers are the same to the last bit on every machine, in every batch.

They run unchanged, in double precision, and every operation that they call goes through
`Portable`: it is done as it is where IEEE 754 says what comes out, or where nothing is computed;
replaced by one of `elementary` or `sums`; or refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mrcnf.codec import elementary, sums
from mrcnf.errors import UserError
from mrcnf.model.model import MultiResolutionFlow

Operation = Callable[..., Any]

_MOVES = """
    _local_scalar_dense _reshape_alias _to_copy _unsafe_view alias all any argmax argmin as_strided
    bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor cat clone
    constant_pad_nd copy detach diagonal empty empty_like empty_strided eq equal expand eye fill
    flip full full_like gather ge gt index index_select isinf isnan le lift_fresh
    lift_fresh_copy logical_and logical_not logical_or logical_xor lt masked_fill masked_scatter
    masked_select max_pool2d_with_indices ne new_empty new_empty_strided new_full new_ones new_zeros
    nonzero ones ones_like permute pixel_shuffle pixel_unshuffle reflection_pad2d repeat
    replication_pad2d roll scalar_tensor select slice sort split split_with_sizes squeeze stack t
    transpose tril triu unbind unfold unsafe_split unsqueeze upsample_nearest2d view where zero
    zeros zeros_like __and__ __iand__ __ilshift__ __ior__ __irshift__ __ixor__ __lshift__ __or__
    __rshift__ __xor__
"""
"""Of any type: they move, compare or choose, or are of whole numbers alone."""
_DEFINED = """
    abs amax amin ceil clamp clamp_max clamp_min copysign floor frexp max maximum min minimum mul
    nan_to_num neg relu sgn sign sqrt trunc
"""
"""Of whole numbers or in double precision: IEEE 754 defines what comes out."""
_OF_INTEGERS = "arange cumsum floor_divide fmod prod remainder"
"""Of whole numbers; in floating point they are unknown."""


def _add(x: Any, y: Any, alpha: Any = 1) -> Any:
    return torch.add(x, y if alpha == 1 else y * alpha)  # not multiplied and added in one


def _sub(x: Any, y: Any, alpha: Any = 1) -> Any:
    return torch.sub(x, y if alpha == 1 else y * alpha)


def _div(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise _unknown("div")
    return torch.div(x, y)


def _round(x: Tensor, decimals: int = 0) -> Tensor:
    if decimals:
        raise _unknown("round")
    return x.round()


def _addcmul(x: Tensor, one: Tensor, other: Tensor, value: float = 1) -> Tensor:
    both = one * other
    return x + (both if value == 1 else value * both)


def _addmm(x: Tensor, one: Tensor, other: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1:
        raise _unknown("addmm")
    return x + sums.product(one, other)


def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    return sums.product(matrix, vector[:, None])[:, 0]


def _sum(
    x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    return sums.total(x, dim, keepdim)


def _mean(
    x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    return sums.mean(x, dim, keepdim)


def _avg_pool2d(
    x: Tensor, size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    *others: Any,
) -> Tensor:  # fmt: skip
    even = not any(side % size[i - 2] for i, side in enumerate(x.shape[-2:]))
    if list(stride or size) != list(size) or any(padding) or not even:
        raise _unknown("avg_pool2d")
    return sums.pooled(x, size)


def _softmax(x: Tensor, dim: int, _: bool = False) -> Tensor:
    return sums.softmax(x, dim)


def _power(x: Any, exponent: Any) -> Tensor:
    if isinstance(exponent, Tensor):
        if isinstance(x, Tensor) or x != 2 or exponent.is_floating_point():
            raise _unknown("pow")
        return elementary.power_of_two(exponent)
    return elementary.power(x, exponent)


def _ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    return x * elementary.power_of_two(exponent)


def _log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    return elementary.log_sigmoid(x), x.new_empty(0)


def _linspace(start: float, end: float, steps: int, **options: Any) -> Tensor:
    points = torch.arange(steps, **options) / max(1, steps - 1)
    return start + (end - start) * points


_OWN: dict[str, Operation] = {
    "add": _add, "sub": _sub, "rsub": lambda x, y, alpha=1: _sub(y, x, alpha), "div": _div,
    "round": _round, "addcmul": _addcmul, "reciprocal": lambda x: 1 / x,
    "square": lambda x: x * x, "rsqrt": lambda x: 1 / x.sqrt(),
    "mm": sums.product, "bmm": sums.product, "addmm": _addmm, "mv": _mv,
    "dot": lambda x, y: sums.total(x * y), "sum": _sum, "mean": _mean,
    "avg_pool2d": _avg_pool2d, "_softmax": _softmax,
    "exp": elementary.exp, "expm1": elementary.expm1, "log": elementary.log,
    "log2": elementary.log2, "log1p": elementary.log1p, "sigmoid": elementary.sigmoid,
    "silu": elementary.silu, "logit": elementary.logit, "softplus": elementary.softplus,
    "log_sigmoid_forward": _log_sigmoid, "tanh": elementary.tanh, "sin": elementary.sin,
    "cos": elementary.cos, "pow": _power, "ldexp": _ldexp, "linspace": _linspace,
}  # fmt: skip
"""In double precision by other operations; whole numbers are left to PyTorch."""


_TO_FLOATS = (
    "exp", "expm1", "log", "log2", "log1p", "sigmoid", "silu", "logit", "softplus",
    "log_sigmoid_forward", "tanh", "sin", "cos", "rsqrt",
)  # fmt: skip
"""Of these, of whole numbers too."""


class Portable(TorchDispatchMode):
    """Within: PyTorch computes what it would compute on any other machine.

    Args:
        model: that is run, see `sums.Convolutions`.

    Raises:
        UserError: within, by operations of which it is not known that they are the same everywhere.
    """

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        super().__init__()
        self._convolutions = sums.Convolutions(model)
        self._known: dict[Any, Operation] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; importing what would make sure of that takes seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self._known:
            self._known[func] = self._operation(func)
        return self._known[func](*args, **(kwargs or {}))

    def _operation(self, func: Any) -> Operation:
        space, name = func.name().partition(".")[0].split("::")
        changes = name.endswith("_") and not name.endswith("__")
        base = name[:-1] if changes else name
        if space != "aten":
            raise _unknown(name)
        if base == "index_put":
            return lambda *args, **kwargs: _placed(args, kwargs) and func(*args, **kwargs)
        if base in _MOVES.split():
            return func
        if base in _DEFINED.split():
            return lambda *args, **kwargs: _checked(base, args) and func(*args, **kwargs)
        if base in _OF_INTEGERS.split():
            return lambda *args, **kwargs: _whole(base, args) and func(*args, **kwargs)
        own = self._convolution if base == "convolution" else _OWN.get(base)
        if own is None:
            raise _unknown(base)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if base != "linspace" and not any(map(_floating, [*args, *kwargs.values()])):
                if base not in _TO_FLOATS:
                    return func(*args, **kwargs)
                args = tuple(x.double() if isinstance(x, Tensor) else x for x in args)
            _checked(base, args)
            if "out" in kwargs:
                raise _unknown(base)
            found = own(*args, **kwargs)
            return args[0].copy_(found) if changes else found

        return replaced

    def _convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
        padding: Sequence[int], dilation: Sequence[int], transposed: bool, _: Any, groups: int,
    ) -> Tensor:  # fmt: skip
        if transposed or x.dim() != 4:
            raise _unknown("convolution")
        return self._convolutions(x, weight, bias, stride, padding, dilation, groups)


@contextmanager
def portable(model: MultiResolutionFlow) -> Iterator[MultiResolutionFlow]:
    """Within: `Portable`, for the copy of a model that is yielded; all in double precision."""
    usual = torch.get_default_dtype()
    with torch.inference_mode(False), torch.no_grad():
        own = copy.deepcopy(model).cpu().double().eval()
        torch.set_default_dtype(torch.float64)
        try:
            with Portable(own):
                yield own
        finally:
            torch.set_default_dtype(usual)


def _floating(x: Any) -> bool:
    return isinstance(x, float) or (isinstance(x, Tensor) and x.is_floating_point())


def _checked(name: str, args: Sequence[Any]) -> bool:
    """`UserError` unless tensors are of whole numbers or in double precision."""
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
            raise UserError(
                f"portable coding computes in double precision, and torch.{name} is given "
                f"{x.dtype}; code this model without --portable"
            )
    return True


def _placed(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """`UserError` if values that come to the same place are added up."""
    if kwargs.get("accumulate") or (len(args) > 3 and args[3]):
        raise _unknown("index_put")
    return True


def _whole(name: str, args: Sequence[Any]) -> bool:
    if any(map(_floating, args)):
        raise _unknown(name)
    return True


def _unknown(name: str) -> UserError:
    return UserError(
        f"portable coding does not know torch.{name.strip('_')}; code this model without --portable"
    )
