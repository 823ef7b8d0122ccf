"""Times and memory of several variants of one computation, taken in turns so that the machine's moods hit all alike."""

import statistics
from collections.abc import Callable

import torch


def milliseconds(
    variants: dict[str, Callable[[], object]], rounds: int, together: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Return the device time of each variant in each round, after one round that does not count.

    ``together`` is called before each run, with an idle device: a barrier, where ranks are to start at one time.
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
    """Return the median over rounds of a variant's time over the reference's in the same round."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def peak_gib(run: Callable[[], object]) -> float:
    """Return the device memory that a run needs beyond what was used before it, in GiB."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
