"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to save and stop; ranks hear them at different times and agree in the step."""

import signal
import time


class StopRequest:
    """Remembers that this process was asked to stop; use as a context."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.received: str | None = None
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
        self.received = signal.Signals(number).name
