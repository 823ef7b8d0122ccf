"""Detect stragglers: find the ranks that slow down the others.

Step times do not show it: all ranks wait for the slowest, so all steps take equally long. Two measurements do, because
they wait for no other rank. One is a fixed matrix product, timed in every step, which is slower on a throttled or
shared GPU. The other is the time that a rank needs to load its data.
"""

import statistics
import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

AVERAGED_STEPS = 50  # length of the moving average
MIN_STEPS = 20  # steps before any rank is reported
SLOW_COMPUTE_FACTOR = {
    "cuda": 1.15,
    "cpu": 1.5,
}  # threshold over the median of all ranks; higher on CPUs, which run other programs, too
SLOW_DATA_FRACTION = 0.05  # threshold of data loading beyond the median, as fraction of a step


class MatmulProbe:
    """Time small matrix products: some milliseconds on a CPU, half a millisecond on a GPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        size, self.times = (2048, 16) if self.on_gpu else (192, 24)
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        row = torch.linspace(
            -1, 1, size, device=device, dtype=dtype
        )  # no random numbers: they would change the training
        self.a, self.out = row.repeat(size, 1), torch.empty(size, size, device=device, dtype=dtype)
        self.events = self.before = None
        self.taken = 0.0

    def run(self) -> None:
        """Run the products. On a GPU, launch them on the current stream. The previous run must have finished."""
        if self.on_gpu:
            self.before = self.events
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        started = time.perf_counter()
        for _ in range(self.times):
            torch.mm(self.a, self.a, out=self.out)
        self.taken = time.perf_counter() - started
        if self.on_gpu:
            self.events[1].record()

    def seconds(self) -> float:
        """Return the seconds of the last run; on a GPU of the previous one, since the last may not have finished."""
        if self.on_gpu:
            return self.before[0].elapsed_time(self.before[1]) / 1e3 if self.before else 0.0
        return self.taken


@dataclass(frozen=True)
class Straggler:
    """Describe a slow rank."""

    rank: int
    host: str
    compute: float  # time of the matmul probe / median of all ranks; 0: below the threshold
    data: float  # seconds per step of data loading above the median; 0: below the threshold

    def __str__(self) -> str:
        reasons = []
        if self.compute:
            reasons.append(f"matmul probe {self.compute:.2f}x the median")
        if self.data > 0:
            reasons.append(f"data loading {self.data:.2g} s per step above the median")
        return f"straggler: rank {self.rank} ({self.host}): {', '.join(reasons)}"


class StragglerDetector:
    """Compare the last steps of all ranks; used on rank 0 only."""

    def __init__(self, hosts: list[str], device_type: str):
        self.hosts, self.too_slow = hosts, SLOW_COMPUTE_FACTOR[device_type]  # hosts: one per rank
        self.steps: deque[tuple[list[float], list[float], float]] = deque(maxlen=AVERAGED_STEPS)

    def add(self, compute: list[float], data: list[float], step_seconds: float) -> None:
        """Record one step: seconds of probe and data loading of each rank, and of the whole step."""
        self.steps.append((compute, data, step_seconds))

    def spread(self) -> float:
        """Return the probe time of the slowest rank / median; 0 before MIN_STEPS steps."""
        return max(self._compute(), default=0.0)

    def slow(self) -> list[Straggler]:
        """Return the stragglers, the slowest first."""
        compute = self._compute()
        if not compute:
            return []
        means = [statistics.fmean(values) for values in zip(*(data for _, data, _ in self.steps), strict=True)]
        usual = statistics.median_low(means)
        late = SLOW_DATA_FRACTION * statistics.fmean(seconds for *_, seconds in self.steps)
        found = [
            Straggler(
                rank,
                host,
                compute[rank] if compute[rank] > self.too_slow else 0.0,
                means[rank] - usual if means[rank] - usual > late else 0.0,
            )
            for rank, host in enumerate(self.hosts)
        ]
        found = [one for one in found if one.compute or one.data]
        return sorted(found, key=lambda one: (-one.compute, -one.data))

    def _compute(self) -> list[float]:
        if len(self.steps) < MIN_STEPS or len(self.hosts) < 2:
            return []
        means = [statistics.fmean(values) for values in zip(*(compute for compute, _, _ in self.steps), strict=True)]
        usual = statistics.median_low(means)  # of two, the faster
        return [mean / usual for mean in means] if usual > 0 else []


def one_hot_table(values: list[float], rank: int, size: int, device: torch.device) -> Tensor:
    """Return (len(values) * size,): this rank's values in its column, zeros elsewhere.

    An all-reduce with MAX yields the table of all ranks.
    """
    table = torch.zeros(len(values), size, device=device)
    table[:, rank] = torch.tensor(values, device=device)
    return table.flatten()
