"""Straggler detection: which ranks hold up the others.

Step times cannot say it: all ranks wait for the slowest, so all take as long. Two things can, for they wait for nobody:
a piece of arithmetic that is the same everywhere, timed in every step, which a GPU that is throttled or shared takes
longer for; and the seconds in which a rank reads its data.
"""

import statistics
import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

AVERAGED_STEPS = 50  # steps that are averaged
MIN_STEPS = 20  # steps before anyone is named
SLOW_COMPUTE_FACTOR = {"cuda": 1.15, "cpu": 1.5}  # times the median of all ranks; on CPUs other programs run, too
SLOW_DATA_FRACTION = 0.05  # of a step, in reading data beyond the median


class MatmulProbe:
    """Small matrix products, some milliseconds of a CPU and half a millisecond of a GPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        size, self.times = (2048, 16) if self.on_gpu else (192, 24)
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        row = torch.linspace(-1, 1, size, device=device, dtype=dtype)  # no random numbers: training's are its own
        self.a, self.out = row.repeat(size, 1), torch.empty(size, size, device=device, dtype=dtype)
        self.events = self.before = None
        self.taken = 0.0

    def run(self) -> None:
        """Does the work; on a GPU, has it done in its turn. The run before must be over."""
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
        """Return the seconds of the last run; on a GPU of the run before, because the last may not be over."""
        if self.on_gpu:
            return self.before[0].elapsed_time(self.before[1]) / 1e3 if self.before else 0.0
        return self.taken


@dataclass(frozen=True)
class Straggler:
    rank: int
    host: str
    compute: float  # what its arithmetic takes, over the median of all ranks; 0: no more than usual
    data: float  # seconds a step in which it reads data, beyond the median; 0: no more than usual

    def __str__(self) -> str:
        reasons = []
        if self.compute:
            reasons.append(f"its arithmetic takes {self.compute:.2f} times what others' takes")
        if self.data > 0:
            reasons.append(f"it reads its data {self.data:.2g} s a step longer")
        return f"rank {self.rank} ({self.host}) holds up the others: {', '.join(reasons)}"


class StragglerDetector:
    """The last steps of all ranks; lives on the first."""

    def __init__(self, hosts: list[str], device_type: str):
        self.hosts, self.too_slow = hosts, SLOW_COMPUTE_FACTOR[device_type]  # hosts: of each rank
        self.steps: deque[tuple[list[float], list[float], float]] = deque(maxlen=AVERAGED_STEPS)

    def add(self, compute: list[float], data: list[float], step_seconds: float) -> None:
        """Note the seconds of each rank's probe and reading in a step, and of the whole step."""
        self.steps.append((compute, data, step_seconds))

    def spread(self) -> float:
        """The slowest rank's arithmetic over the median's; 0 while too little is known."""
        return max(self._compute(), default=0.0)

    def slow(self) -> list[Straggler]:
        """The slowest first."""
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
    """(len(values) * size,) this rank's numbers among zeros: the largest of all ranks is everyone's."""
    table = torch.zeros(len(values), size, device=device)
    table[:, rank] = torch.tensor(values, device=device)
    return table.flatten()
