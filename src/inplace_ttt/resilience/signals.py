"""Receive stop signals: SIGTERM, SIGUSR1 and Ctrl-C ask a run to save a checkpoint and stop.

Ranks receive them at different times; they agree within a step.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker


class StopRequest:
    """Record stop signals of this process while the context is active."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.received: str | None = None  # name of the first signal
        self.answer: str | None = None  # printed by rank 0 at the first signal
        self._heard = 0.0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        now = time.monotonic()
        # torchrun forwards a SIGINT that the terminal has already sent to all: only a later one means "do not wait"
        if number == signal.SIGINT and self.received == "SIGINT" and now - self._heard > 2:
            raise KeyboardInterrupt
        self._heard = now
        if self.received is None and self.answer and os.environ.get("RANK", "0") == "0":
            os.write(2, f"{self.answer}\n".encode())
        self.received = signal.Signals(number).name


@contextlib.contextmanager
def block_stop_signals() -> Iterator[None]:
    """Block stop signals in processes that are started in this context.

    A scheduler signals every process of a job. Helper processes must not die before their rank has saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        resource_tracker.ensure_running()  # unblocks some of these signals when it starts, so start it first
        signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent process dies."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
