"""The lanes of a file: successive images on a stack of their own, in a process of their own.

Blocks on one stack wait for each other. A file of many images has several stacks, whose number
the images decide and not the machine: it is the same file whoever writes it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar

from tqdm import tqdm

from mrcnf.model.model import MultiResolutionFlow

Job = TypeVar("Job")
Found = TypeVar("Found")
Tick = Callable[[int], object]
Function = Callable[[MultiResolutionFlow, Job, Tick], Found]

PIXELS = 1 << 19
"""Of a lane, about: 512 images of 32×32. What it takes to begin is as much as two of them."""
_POLL = 0.2  # seconds


def split(pixels: Sequence[int], count: int | None = None) -> list[range]:
    """The images of each lane, from all images' numbers of pixels.

    Args:
        count: of the lanes, unless the images are fewer.
    """
    total = sum(pixels)
    wanted = count or max(1, round(total / PIXELS))
    lanes, start, done = list[range](), 0, 0
    for i, own in enumerate(pixels, 1):
        done += own
        if done * wanted >= total * (len(lanes) + 1):
            lanes.append(range(start, i))
            start = i
    return lanes


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
        workers: processes, at most as many as there are jobs; with 1, all is done in this one.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        return [function(model, job, bar.update) for job in jobs]
    context = get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(
        workers, context, initializer=_begin, initargs=(pickle.dumps(model), counter)
    ) as pool:
        try:
            running = [pool.submit(_run, function, job) for job in jobs]
            for done in _counted(counter, running):
                bar.update(done - bar.n)
            return [future.result() for future in running]
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


def _run(function: Function[Job, Found], job: Job) -> Found:
    assert _own is not None
    model, counter = _own

    def tick(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    return function(model, job, tick)
