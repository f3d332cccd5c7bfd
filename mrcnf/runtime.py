"""Where work runs: the device, signals, and the process group of torchrun."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import signal
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mrcnf.errors import UserError


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of this package and of what its numbers rest on, by name."""
    found = {"python": platform.python_version()}
    for name in ("mrcnf", "torch", "torchdiffeq", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from its source
            found[name] = "not installed"
    return found


def choose_device(name: str) -> torch.device:
    """The device by name; "auto" takes CUDA where there is one.

    "cuda" is GPU 0, or under torchrun the GPU of this process's number on its host (LOCAL_RANK).

    Raises:
        UserError: there is no such device, or not one for each process of this host.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"device {name!r} was asked for, but PyTorch sees no CUDA device")
    return _own_gpu(name, device.index)


def _own_gpu(name: str, index: int | None) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if index is not None and beside > 1:
        raise UserError(
            f"device {name!r} is one GPU for the {beside} processes of this host; use cuda, which "
            "gives each its own"
        )
    if max(beside, local + 1) > gpus:
        raise UserError(
            f"{beside} processes on this host need a GPU each, and PyTorch sees {gpus}; start "
            f"torchrun with --nproc-per-node {gpus}, or use the device cpu"
        )
    if index is not None and index >= gpus:
        raise UserError(
            f"there is no device {name!r}: PyTorch sees {gpus}, cuda:0 to cuda:{gpus - 1}"
        )
    return torch.device("cuda", local if index is None else index)


def require_compiler(device: torch.device, setting: str) -> None:
    """A UserError where torch.compile would find no C++ compiler for the CPU.

    Args:
        setting: what asks for it, e.g. "train.compile".
    """
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        raise UserError(
            f"{setting} needs a C++ compiler (g++ or clang++) on a CPU; install one, or set "
            f"{setting}=false"
        )


def compile_methods(module: nn.Module, *names: str, **options: Any) -> None:
    """Compile methods of one module with torch.compile, each shape to code of its own.

    torch.compile counts what it makes by code object, and goes back to eager computation after a
    few; the methods of several modules of one class are one code object, so each gets its own.
    Kernels for any shape (`dynamic`) would be slower.
    """
    for name in names:
        method = getattr(module, name)
        function = method.__func__
        own = types.FunctionType(
            function.__code__.replace(), function.__globals__, function.__name__,
            function.__defaults__, function.__closure__,
        )  # fmt: skip
        own.__kwdefaults__ = function.__kwdefaults__
        bound = types.MethodType(own, module)
        setattr(module, name, torch.compile(bound, **({"dynamic": False} | options)))


@contextlib.contextmanager
def stop_on_signal(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Within: SIGTERM and Ctrl-C no longer kill, the yielded function says whether one came.

    With several processes it must be called by all of them alike, and says the same to all.

    Args:
        device: this process's own, from `processes`, where the group communicates.
    """
    received: list[int] = []

    def stop() -> bool:
        _, world = rank_and_world()
        if world == 1:
            return bool(received)
        flag = torch.tensor(len(received), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    handlers = {
        number: signal.signal(number, lambda n, _: received.append(n))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the process group when started by torchrun; leave it at the end, together.

    The barrier gives gloo's threads the time to let go of the last tensors. One that does so
    while the interpreter shuts down aborts the process (pytorch/pytorch#179291), and threads
    outlive the group when DistributedDataParallel has used it.

    Args:
        device: of this work, by a name that `choose_device` knows.

    Yields:
        this process's own device: with NCCL a GPU that it shares with no other.

    Raises:
        UserError: see `choose_device`.
    """
    own = choose_device(device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield own
        return
    on_gpu = own.type == "cuda"
    if on_gpu:
        # Before the group is made: NCCL talks over the current device, which is GPU 0 otherwise.
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield own
        dist.barrier(device_ids=[own.index] if on_gpu else None)
    finally:
        dist.destroy_process_group()


def sum_over_processes(values: Tensor, device: torch.device) -> Tensor:
    """The sum of every process's values, on the CPU; `device` is where the group communicates."""
    total = values.to(device)
    dist.all_reduce(total)
    return total.cpu()


def of_first_process(work: Callable[[], str]) -> str:
    """What the first process makes of some work, which the others leave to it; called by all."""
    rank, world = rank_and_world()
    found = [work() if rank == 0 else ""]
    if world > 1:
        dist.broadcast_object_list(found)
    return found[0]


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are: 0 and 1 without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
