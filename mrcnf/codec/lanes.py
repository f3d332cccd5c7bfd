"""The lanes of a file: successive images on a stack of their own, in a process of their own.

Blocks on one stack wait for each other. A file of many images has several stacks, whose number
the images decide and not the machine: it is the same file whoever writes it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar

from tqdm import tqdm

from mrcnf import plugins
from mrcnf.codec.pyramid import Tick
from mrcnf.errors import UserError
from mrcnf.model.model import MultiResolutionFlow

Job = TypeVar("Job")
Found = TypeVar("Found")
Function = Callable[[MultiResolutionFlow, Job, Tick], Found]

PIXELS = 1 << 19
"""Of a lane, about: 512 images of 32×32, beside which it matters little what it takes to begin."""
_POLL = 0.2  # seconds


def split(pixels: Sequence[int], count: int | None = None) -> list[range]:
    """The images of each lane, from all images' numbers of pixels.

    Args:
        count: of the lanes, unless the images are fewer.
    """
    total = sum(pixels)
    wanted = count or max(1, round(total / PIXELS))
    lanes, start, own = list[range](), 0, 0
    for i, found in enumerate(pixels, 1):
        own += found
        if own * wanted >= total:
            lanes.append(range(start, i))
            start, own = i, 0
    if own and lanes and 2 * own * wanted < total:  # too few to begin anew
        start = lanes.pop().start
    return [*lanes, range(start, len(pixels))] if start < len(pixels) else lanes


def check(workers: int) -> None:
    """A UserError for a number of processes that cannot be."""
    if workers < 1:
        raise UserError(f"workers are numbers from 1, got {workers}")


def each(
    function: Function[Job, Found],
    model: MultiResolutionFlow,
    jobs: Sequence[Job],
    *,
    workers: int,
    bar: tqdm[Any],
) -> list[Found]:
    """What a function makes of each lane, in their order.

    Args:
        function: of a module, is given the model, a job, and what to tell how much is done.
        workers: processes, at most as many as there are jobs; with 1, or where the model has a
            user's own code from a file, which others would not find, all is done in this one.

    Raises:
        UserError: no such number of processes, or one of them is gone.
    """
    check(workers)
    workers = min(workers, len(jobs))
    if workers <= 1 or plugins.made_of_files(type(module) for module in model.modules()):
        return [function(model, job, bar.update) for job in jobs]
    context = get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(
        workers, context, initializer=_begin, initargs=(pickle.dumps(model), counter)
    ) as pool:
        try:
            # As bytes: tensors would travel as files that stay open, one each.
            running = [pool.submit(_run, pickle.dumps((function, job))) for job in jobs]
            for done in _counted(counter, running):
                bar.update(done - bar.n)
            return [pickle.loads(future.result()) for future in running]
        except BrokenProcessPool:
            raise UserError(
                "a process of the codec was stopped, perhaps for lack of memory; use fewer workers"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _counted(counter: Synchronized[int], running: Sequence[Future[Any]]) -> Iterator[int]:
    """The counter now and then, until all is done or something failed."""
    while True:
        done, going_on = wait(running, timeout=_POLL, return_when="FIRST_EXCEPTION")
        yield counter.value
        if not going_on or any(future.exception() for future in done):
            return


# In a process of its own: the model, and a counter of what is done in all of them.
_own: tuple[MultiResolutionFlow, Synchronized[int]] | None = None


def _begin(model: bytes, counter: Synchronized[int]) -> None:
    global _own
    _own = pickle.loads(model), counter


def _run(task: bytes) -> bytes:
    assert _own is not None
    model, counter = _own
    function, job = pickle.loads(task)

    def tick(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    return pickle.dumps(function(model, job, tick))
