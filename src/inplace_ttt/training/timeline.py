"""``timeline.jsonl``: when a run started and started again, what that cost, and which ranks held it up.

metrics.jsonl is what a run computes, the same however often it was interrupted; this is what happened to it. Records:

- ``start``: ``time`` (Unix seconds), ``step`` after which it goes on, ``hosts``, ``ranks``; of a restart also
  ``down_seconds`` (from the last step of the start before to the first of this one), ``redone_steps`` and
  ``redone_seconds`` (what was done after the checkpoint and is done again)
- ``ranks``: ``step``, ``spread`` (the slowest rank's arithmetic over the median's), ``slow`` (see stragglers.py)
- ``end``: ``time``, ``why``; a run that was killed has none
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from inplace_ttt.files import read_json_lines
from inplace_ttt.training.records import read_metrics

NAME = "timeline.jsonl"
ON_PURPOSE = ("done", "asked to stop")  # how the reasons begin of ends that nothing failed in


class Timeline:
    """Written by the first rank."""

    def __init__(self, folder: Path):
        self.path = folder / NAME

    def start(self, metrics: Path, step: int, hosts: list[str]) -> None:
        """To be called before what is in ``metrics`` beyond ``step`` is taken back."""
        now, record = time.time(), dict(step=step, ranks=len(hosts), hosts=sorted(set(hosts)))
        before = [r for r in read_metrics(metrics) if not r.get("eval")]
        if read_timeline(self.path.parent):
            redone = [r for r in before if r["step"] > step]
            alive = metrics.stat().st_mtime if before else self.path.stat().st_mtime
            record |= dict(
                down_seconds=round(max(0.0, now - alive), 1),  # a clock may have jumped
                redone_steps=len(redone),
                redone_seconds=round(sum(r["step_seconds"] for r in redone), 1),
            )
        self.write("start", time=round(now, 1), **record)

    def end(self, why: str) -> None:
        """Why the run ends; if even that cannot be written, nothing is lost."""
        with contextlib.suppress(OSError):
            self.write("end", time=round(time.time(), 1), why=why)

    def write(self, event: str, **values) -> None:
        with open(self.path, "ab+", opener=_own_file) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            cut_off = file.read(1) not in (b"", b"\n")  # by a full disk, or a machine that lost its power
            file.write(b"\n" * cut_off + json.dumps(dict(event=event, **values)).encode() + b"\n")


def _own_file(path: str, flags: int) -> int:
    """Open a file of the run's folder; a link there may lead to a file of the user's that is none of the run's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def read_timeline(folder: Path) -> list[dict]:
    """Return all records but those that were cut off or damaged."""
    return [record for record in read_json_lines(folder / NAME)[0] if _is_event(record)]


def _is_event(record: dict) -> bool:
    """Return whether a line has what its kind of event has."""
    kinds = {
        "start": dict(step=int, ranks=int, hosts=list, time=float),
        "ranks": dict(step=int, slow=list),
        "end": dict(why=str),
    }
    needed = kinds.get(record.get("event"))
    values = [record.get(key) for key in ("down_seconds", "redone_steps", "redone_seconds") if key in record]
    return (
        needed is not None
        and all(isinstance(record.get(key), (int, float) if kind is float else kind) for key, kind in needed.items())
        and all(isinstance(value, int | float) for value in values)
    )


@dataclass(frozen=True)
class RestartCost:
    """Sum the time that went to restarts after crashes.

    A run that was done, or stopped as asked, lost nothing until its next start.
    """

    restarts: int = 0
    down_seconds: float = 0.0
    redone_steps: int = 0
    redone_seconds: float = 0.0

    @classmethod
    def of(cls, timeline: Iterable[dict]) -> "RestartCost":
        again, on_purpose = [], False
        for event in timeline:
            if event["event"] == "start" and "down_seconds" in event and not on_purpose:
                again.append(event)
            if event["event"] in ("start", "end"):
                on_purpose = event["event"] == "end" and event["why"].startswith(ON_PURPOSE)
        keys = ("down_seconds", "redone_steps", "redone_seconds")
        return cls(len(again), *(sum(event.get(key, 0) for event in again) for key in keys))

    @property
    def seconds(self) -> float:
        return self.down_seconds + self.redone_seconds
