"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to save and stop; ranks hear them at different times and agree in the step."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker


class StopRequest:
    """Remembers that this process was asked to stop; use as a context."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.received: str | None = None
        self.answer: str | None = None  # is printed when the first request comes, by whoever sets it
        self._heard = 0.0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        now = time.monotonic()
        # torchrun passes on what the terminal has sent to all: only a later Ctrl-C means that the user will not wait
        if number == signal.SIGINT and self.received == "SIGINT" and now - self._heard > 2:
            raise KeyboardInterrupt
        self._heard = now
        if self.received is None and self.answer and os.environ.get("RANK", "0") == "0":
            os.write(2, f"{self.answer}\n".encode())
        self.received = signal.Signals(number).name


@contextlib.contextmanager
def block_stop_signals() -> Iterator[None]:
    """Processes started inside never hear a request to stop.

    A scheduler sends it to every process of a job. A rank saves and leaves; what helps it to save must not die first.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        resource_tracker.ensure_running()  # which opens a part of the mask again, so not later
        signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Have the system kill this process when the one that started it is gone."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
