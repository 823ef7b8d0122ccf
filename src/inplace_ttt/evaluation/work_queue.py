"""Distribute work dynamically over ranks, on the job's torch store, and progress output with the remaining time."""

import sys
import time
from collections.abc import Iterator

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from inplace_ttt.job import EXIT_INTERRUPTED, RESUME_HINT, SLOW_PHASE_FACTOR, Job, JobStopped

LINE = 30.0  # seconds between progress lines without a terminal
POLL_INTERVAL = 0.1  # seconds between checks whether the other ranks have finished


class WorkQueue:
    """Distribute pieces of work over the ranks of a job: a rank that is done takes the next piece, in order.

    All ranks must construct and iterate it.
    """

    def __init__(self, job: Job, name: str, costs: list[float], samples: list[int], done: int = 0, key: str = ""):
        """Open the queue in the job's store; rank 0 starts the progress display.

        Args:
            name: name in messages.
            costs: tokens per piece.
            samples: samples per piece.
            done: samples done by an earlier start of the command.
            key: distinguishes queues of the same name.
        """
        self.job, self.name, self.costs, self.samples = job, name, costs, samples
        self.store = dist.PrefixStore(f"share/{name}/{key}", job.store)
        self.before = done
        self.meter = ProgressMeter(name, done + sum(samples), done) if job.world.rank == 0 else None
        self.started = time.monotonic()

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of this rank's pieces; return when all ranks are done.

        Raises JobStopped, on all ranks, if a rank received a stop request and pieces are left.
        """
        try:
            self.job.stop.answer = f"{self.name}: stop requested, finishing the current batches"
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
            if self.job.stop.received:  # torchrun also sends a stop signal when another rank has died
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
    """Return the exception for a job that was stopped before all samples were done."""
    return JobStopped(
        f"{name} stopped on request: {done} of {total} samples are done; rerun the same command to resume",
        EXIT_INTERRUPTED,
    )


class ProgressMeter:
    """Show progress and the remaining time: a bar in a terminal, otherwise a line every ``LINE`` seconds."""

    def __init__(self, name: str, samples: int, done: int = 0):
        self.name, self.samples, self.done = name, samples, done
        self.started = self.said = time.monotonic()
        self.bar = None
        console = Console(stderr=True)
        if done:
            print(f"{name}: {done} of {samples} samples are already done", file=sys.stderr, flush=True)
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
        """Update the display.

        Args:
            done: number of samples done.
            share: fraction of the work done since this meter was created, from 0 to 1.
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
        """Count one more sample; all samples have equal cost."""
        self.done += 1
        self.show(self.done, self.done / self.samples)

    def close(self) -> None:
        """Remove the bar from the terminal. May be called more than once."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def say_speed(name: str, samples: int, tokens: float, seconds: float) -> None:
    """Print the number of samples and the speed in tokens per second."""
    each = f"{tokens / 1e6:.2f} million tokens" if tokens >= 1e6 else f"{tokens:,.0f} tokens"
    speed = tokens / max(seconds, 1e-9)
    print(
        f"{name}: {counted(samples, 'sample')}, {each} in {duration(seconds)}, {speed:,.0f} tokens per second",
        flush=True,
    )


def say_done(name: str, samples: int) -> None:
    """Print that all samples were done by an earlier start of the command."""
    print(f"{name}: all {counted(samples, 'sample')} are already done", flush=True)


def counted(number: int, word: str) -> str:
    """Return a number with its noun: 1 sample, 2 samples."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration as text: 45 s, 12 min or 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
