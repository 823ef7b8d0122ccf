"""Measure time and memory of variants of one computation, which run in turns so that all see the same clock rates."""

import statistics
from collections.abc import Callable

import torch


def milliseconds(
    variants: dict[str, Callable[[], object]], rounds: int, together: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Return the device time of each variant in each round, in milliseconds, after one warm-up round.

    ``together`` is called before each run, when the device is idle; pass a barrier to start all ranks at the same time.
    """
    times = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            together()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if number:
                times[name].append(start.elapsed_time(end))
    return times


def ratio(times: list[float], reference: list[float]) -> float:
    """Return the median over rounds of time / reference time in the same round."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def peak_gib(run: Callable[[], object]) -> float:
    """Return the peak device memory of a run in GiB, without memory allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
