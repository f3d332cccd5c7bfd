"""Where training runs: the device, signals, and the process group of torchrun."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mrcnf.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device by name; "auto" takes CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {name!r} was asked for, but PyTorch sees no CUDA device")
        if device.index is None:
            device = torch.device("cuda", int(rank_and_world()[0]) % torch.cuda.device_count())
    return device


def require_compiler(device: torch.device) -> None:
    """A UserError where torch.compile would find no C++ compiler for the CPU."""
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        raise UserError(
            "train.compile needs a C++ compiler (g++ or clang++) on a CPU; install one, or set "
            "train.compile=false"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    allocator = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return allocator or isinstance(error, (torch.OutOfMemoryError, MemoryError))


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Within: SIGTERM and Ctrl-C no longer kill, the yielded function says whether one came.

    With several processes it must be called by all of them alike, and says the same to all.
    """
    received: list[int] = []

    def stop() -> bool:
        _, world = rank_and_world()
        if world == 1:
            return bool(received)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
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
def processes(device: str) -> Iterator[None]:
    """Join the process group when started by torchrun; leave it at the end, together.

    The barrier gives gloo's threads the time to let go of the last tensors. One that does so
    while the interpreter shuts down aborts the process (pytorch/pytorch#179291), and threads
    outlive the group when DistributedDataParallel has used it.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def sum_over_processes(values: Tensor, device: torch.device) -> Tensor:
    """The sum of every process's values, on the CPU; `device` is where the group communicates."""
    total = values.to(device)
    dist.all_reduce(total)
    return total.cpu()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are: 0 and 1 without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
