"""Write ``timeline.jsonl``: starts and restarts of a run, their cost, and stragglers.

metrics.jsonl holds what a run computes, which does not depend on interruptions. timeline.jsonl holds the interruptions.
Records:

- ``start``: ``time`` (Unix seconds), ``step`` (last finished step), ``hosts``, ``ranks`` (number of ranks); a restart
  also has ``down_seconds`` (from the last record of the previous start to this start), ``redone_steps`` and
  ``redone_seconds`` (number and duration of the steps after the checkpoint, which are repeated)
- ``ranks``: ``step``, ``spread`` (probe time of the slowest rank over the median), ``slow`` (see stragglers.py)
- ``end``: ``time``, ``why``; missing if the run was killed
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
ON_PURPOSE = ("done", "asked to stop")  # prefixes of ``why`` if nothing failed


class Timeline:
    """Append records to timeline.jsonl. Only rank 0 uses it."""

    def __init__(self, folder: Path):
        self.path = folder / NAME

    def start(self, metrics: Path, step: int, hosts: list[str]) -> None:
        """Record a start after ``step`` on ``hosts`` (one entry per rank).

        Call this before the records beyond ``step`` are removed from ``metrics`` (metrics.jsonl).
        """
        now, record = time.time(), dict(step=step, ranks=len(hosts), hosts=sorted(set(hosts)))
        before = [r for r in read_metrics(metrics) if not r.get("eval")]
        if read_timeline(self.path.parent):
            redone = [r for r in before if r["step"] > step]
            alive = metrics.stat().st_mtime if before else self.path.stat().st_mtime
            record |= dict(
                down_seconds=round(max(0.0, now - alive), 1),  # the clock may have been set back
                redone_steps=len(redone),
                redone_seconds=round(sum(r["step_seconds"] for r in redone), 1),
            )
        self.write("start", time=round(now, 1), **record)

    def end(self, why: str) -> None:
        """Record the reason of the end of a run. Ignore an OSError."""
        with contextlib.suppress(OSError):
            self.write("end", time=round(time.time(), 1), why=why)

    def write(self, event: str, **values) -> None:
        """Append a record of an event."""
        with open(self.path, "ab+", opener=_own_file) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            cut_off = file.read(1) not in (b"", b"\n")  # by a full disk or a power failure
            file.write(b"\n" * cut_off + json.dumps(dict(event=event, **values)).encode() + b"\n")


def _own_file(path: str, flags: int) -> int:
    """Open a file in the run folder. Do not follow links, which may point to a user's file outside it."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def read_timeline(folder: Path) -> list[dict]:
    """Return all records except incomplete and damaged ones."""
    return [record for record in read_json_lines(folder / NAME)[0] if _is_event(record)]


def _is_event(record: dict) -> bool:
    """Return whether a record has the fields of its event."""
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
    """Hold the number and the cost of restarts after crashes.

    The time between a regular end (done, or stopped on request) and the next start does not count.
    """

    restarts: int = 0
    down_seconds: float = 0.0  # time without a running step
    redone_steps: int = 0
    redone_seconds: float = 0.0  # time of the repeated steps

    @classmethod
    def of(cls, timeline: Iterable[dict]) -> "RestartCost":
        """Sum the cost of the restarts in the records of a timeline.jsonl."""
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
        """Return the total time lost in seconds."""
        return self.down_seconds + self.redone_seconds
