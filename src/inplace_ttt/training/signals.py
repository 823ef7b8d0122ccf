"""SIGTERM and SIGUSR1 ask a run to save and stop. Ranks may hear them at different times: they agree in the step."""

import signal


class StopRequest:
    """Remembers that this process was asked to stop; use as a context."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.received = signal.Signals(number).name
