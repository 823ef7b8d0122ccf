"""Share work between ranks piece by piece: who is done takes the next one. Progress with the time left."""

import sys
import time
from collections.abc import Iterator

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from inplace_ttt.job import EXIT_INTERRUPTED, RESUME_HINT, SLOW_PHASE_FACTOR, Job, JobStopped

LINE = 30.0  # seconds between lines where there is no terminal
POLL_INTERVAL = 0.1  # seconds between two looks at ranks that are still at work


class WorkQueue:
    """Deal out numbered pieces of work, whose costs are known, over the ranks of a job. Every rank makes it."""

    def __init__(self, job: Job, name: str, costs: list[float], samples: list[int], done: int = 0, key: str = ""):
        """Args:
        name: shown.
        costs: of each piece, in tokens.
        samples: in each piece.
        done: samples that were done before.
        key: tells pieces of work of the same name apart.
        """
        self.job, self.name, self.costs, self.samples = job, name, costs, samples
        self.store = dist.PrefixStore(f"share/{name}/{key}", job.store)
        self.before = done
        self.meter = ProgressMeter(name, done + sum(samples), done) if job.world.rank == 0 else None
        self.started = time.monotonic()

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of this rank's pieces, and return when all ranks are done.

        Raises JobStopped, on all ranks, where one was asked to stop and something is left to do.
        """
        try:
            self.job.stop.answer = f"{self.name}: asked to stop, the batches at hand are finished"
            while not self.job.stop.received and (number := self.store.add("next", 1) - 1) < len(self.costs):
                self.job.watchdog.set_phase(f"{self.name}, part {number + 1} of {len(self.costs)}", SLOW_PHASE_FACTOR)
                yield number
                self.store.add("cost", round(1000 * self.costs[number]))
                self.store.add("samples", self.samples[number])
                self._show()
            self._wait()
        finally:
            if self.meter is not None:
                self.meter.close()

    def _wait(self) -> None:
        self.job.watchdog.set_phase(f"waiting for the other ranks in {self.name}", SLOW_PHASE_FACTOR)
        self.store.add("finished", 1)
        while self.store.add("finished", 0) < self.job.world.size:
            time.sleep(POLL_INTERVAL)
            self._show()
            if self.job.stop.received:  # perhaps because another rank is gone, which torchrun answers so
                lost = self.job.watchdog.explain_loss()
                if lost is not None:
                    raise JobStopped(f"contact with another rank was lost: {lost}; {RESUME_HINT}", 4)
        done, total = self.before + self.store.add("samples", 0), self.before + sum(self.samples)
        if done < total:
            raise interrupted(self.name, done, total)
        if self.meter is not None:
            self.meter.close()
            say_speed(self.name, total - self.before, sum(self.costs), time.monotonic() - self.started)

    def _show(self) -> None:
        if self.meter is not None:
            share = self.store.add("cost", 0) / 1000 / max(sum(self.costs), 1e-9)
            self.meter.show(self.before + self.store.add("samples", 0), share)


def interrupted(name: str, done: int, total: int) -> JobStopped:
    """Return what ends a job that was asked to stop before all its samples were done."""
    return JobStopped(
        f"{name} was asked to stop: {done} of {total} samples are done, and the same command goes on", EXIT_INTERRUPTED
    )


class ProgressMeter:
    """Show how far a piece of work is, and the time left: a bar in a terminal, else a line now and then."""

    def __init__(self, name: str, samples: int, done: int = 0):
        self.name, self.samples, self.done = name, samples, done
        self.started = self.said = time.monotonic()
        self.bar = None
        console = Console(stderr=True)
        if done:
            print(f"{name}: {done} of {samples} samples were done before", file=sys.stderr, flush=True)
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total} samples"),
                TextColumn("{task.fields[left]}"),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task(name, total=samples, completed=done, left="")
            self.bar.start()

    def show(self, done: int, share: float) -> None:
        """Args:
        done: samples.
        share: of the work, from 0 to 1, since this meter began.
        """
        now = time.monotonic()
        left = (now - self.started) * (1 - share) / share if share > 0 else None
        said = "" if left is None else f"{duration(left)} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, left=said)
        elif now - self.said > LINE and said:
            self.said = now
            print(f"{self.name}: {done} of {self.samples} samples, {said}", file=sys.stderr, flush=True)

    def advance(self) -> None:
        """Count one more of samples of equal cost."""
        self.done += 1
        self.show(self.done, self.done / self.samples)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def say_speed(name: str, samples: int, tokens: float, seconds: float) -> None:
    """Print how fast samples were done."""
    each = f"{tokens / 1e6:.2f} million tokens" if tokens >= 1e6 else f"{tokens:,.0f} tokens"
    speed = tokens / max(seconds, 1e-9)
    print(f"{name}: {counted(samples, 'sample')} of {each} in {duration(seconds)}, {speed:,.0f} a second", flush=True)


def say_done(name: str, samples: int) -> None:
    """Print that nothing is left to do."""
    print(f"{name}: all {counted(samples, 'sample')} were done before", flush=True)


def counted(number: int, word: str) -> str:
    """Return 1 sample or 2 samples."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return 45 s, 12 min or 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
