"""Alternating runs, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(works: dict[str, Work], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each work in each round; a round runs all of them once, in order."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for lap in range(repeats + 1):
        for name, work in works.items():
            wait(device)
            started = time.perf_counter()
            work()
            wait(device)
            if lap:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(reference: list[float], ours: list[float]) -> dict[str, object]:
    """Medians, their ratio, and the extremes of the ratios round by round."""
    ratios = [a / b for a, b in zip(reference, ours, strict=True)]
    before, after = statistics.median(reference), statistics.median(ours)
    return {
        "ratio": before / after,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "seconds": after,
        "reference_seconds": before,
        "repeats": len(ratios),
    }


def peak_bytes(work: Work, device: torch.device) -> int:
    """Most memory held above what was held before, by tensors.

    On CUDA the caching allocator's own count. On a CPU the running sum of PyTorch's allocations
    and releases as its profiler sees them: exact for tensors, blind to oneDNN's scratch space
    and to the interpreter.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
