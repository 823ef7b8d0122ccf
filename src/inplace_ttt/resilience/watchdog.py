"""Watch a job: detect a hanging rank, and report which one it is and where the others wait for it.

A collective waits for its slowest rank: if one is stopped or disconnected, all ranks hang without knowing why. So each
rank records its current phase. A background thread writes a heartbeat with this phase to the job's store once per
second. If a phase exceeds the time limit, or another rank sends no heartbeat for that long, the thread reads all
heartbeats and ends the job with one message. Only durations of a local monotonic clock are compared, since wall clocks
of hosts differ and can jump.

Without a network the store's client may block forever. So a second thread watches the phase of its own rank, and every
request to the store has a timeout.

Anyone who can reach the store's port can write to it. Once the ranks are connected they sign heartbeats with a key that
they share through the process group, never through the store.
"""

import contextlib
import faulthandler
import hmac
import json
import math
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

import inplace_ttt
from inplace_ttt.config import one_line
from inplace_ttt.environment import World
from inplace_ttt.resilience.rendezvous import Rendezvous

# files of innermost Python frames that show that a rank waits for others
_WAITING = ("torch/distributed/", "ttt/transport/", "p2p_communication.py", "tensor_parallel/mappings")
PACKAGE = Path(inplace_ttt.__file__).parent
ANSWER = 10.0  # timeout in seconds for requests to the store
DONE = "done"  # reason of a rank that ends without an error


@dataclass
class Heartbeat:
    """Hold the status that a rank publishes."""

    number: int  # increases with every heartbeat
    host: str
    process: int  # process ID
    phases: int  # number of phases so far
    phase: str  # current phase
    where: str  # current function or line; empty until the phase lasts for two intervals
    waiting: bool  # waits for other ranks; False until the phase lasts for two intervals
    left: str | None = None  # reason for its end; None: running

    @property
    def failed(self) -> bool:
        """Return True if the rank has ended with an error; False while it runs and after a regular end."""
        return self.left not in (None, DONE)


@dataclass
class PeerStatus:
    """Hold the last heartbeat of a rank, and the seconds since it arrived."""

    beat: Heartbeat
    silent: float


class Watchdog:
    """Watch all ranks from one rank, in background threads. Without a store nothing is watched."""

    INTERVAL = 1.0  # seconds between heartbeats

    def __init__(self, rank: int, size: int, limit: float, on_hang: Callable[[str], None], store=None):
        """Start watching if there is a store.

        Args:
            limit: seconds that a phase may take, times its timeout factor.
            on_hang: called in a background thread with the message; must end the process.
            store: store of the job; None: do not watch.
        """
        self.rank, self.size, self.limit, self.on_hang, self.store = rank, size, limit, on_hang, store
        self.interval = min(self.INTERVAL, limit / 10)
        self._phases, self._phase, self._since, self._timeout_factor = 0, "starting", time.monotonic(), 1.0
        self._main, self._host = threading.get_ident(), socket.gethostname()
        self._number, self._left = 0, None
        self._secret: bytes | None = None
        self._seen: dict[int, tuple[Heartbeat, float]] = {}  # per rank: last heartbeat and its arrival time
        self._lock, self._ended = threading.Lock(), threading.Event()
        if store is not None:
            self._send_heartbeat()
            for name, run in (("tell", self._send_heartbeats), ("guard", self._check_own_progress)):
                threading.Thread(target=run, name=name, daemon=True).start()

    @classmethod
    def join(
        cls, world: World, limit: float, on_hang: Callable[[str], None], rendezvous: Rendezvous | None
    ) -> "Watchdog":
        """Watch through a separate connection to the job's store; without a rendezvous (one process) do not watch."""
        store = None
        if rendezvous is not None:
            store = dist.PrefixStore("watch", rendezvous.connect())
        return cls(world.rank, world.size, limit, on_hang, store)

    def share_secret(self) -> None:
        """Share a key for signing heartbeats through the process group. All ranks must call this.

        From then on heartbeats with another signature are ignored, since anyone who reaches the store can write to it.
        """
        if self.store is not None:
            secret = [secrets.token_bytes(32)]
            dist.broadcast_object_list(secret, src=0)
            for beat, _ in list(self._seen.values()):  # unsigned ones may be forged; all ranks are alive here
                beat.number, beat.left = -1, None
            self._secret = secret[0]
            self._send_heartbeat()

    def set_phase(self, phase: str, timeout_factor: float = 1.0) -> None:
        """Start a phase, which may take ``timeout_factor`` times the limit."""
        self._phases, self._phase, self._timeout_factor, self._since = (
            self._phases + 1,
            phase,
            timeout_factor,
            time.monotonic(),
        )

    def leave(self, why: str = DONE) -> None:
        """Stop watching, and publish why this rank ends, since the others will lose contact with it."""
        if self.store is not None and not self._ended.is_set():
            self._left = why
            _within(ANSWER, self._send_heartbeat)
            self._ended.set()

    def finish(self) -> None:
        """Wait until all ranks have finished, then stop watching.

        A rank that left at once could not report that another rank hangs in its last phase.
        """
        if self.store is None:
            return
        self.set_phase("waiting for the other ranks to finish", math.inf)
        self._left = DONE
        _within(ANSWER, self._send_heartbeat)
        while not self._ended.is_set():
            known = _within(ANSWER, self._read_heartbeats)
            # None: the store is gone. If rank 0 opened it, all ranks have finished, since rank 0 waits for them
            if known is None or all(seen.beat.left for rank, seen in known.items() if rank != self.rank):
                self._ended.set()
            else:
                self._check_peers(known)
                time.sleep(self.interval / 10)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind, error, _) -> None:
        self.leave(DONE if error is None else one_line(error))

    def explain_loss(self) -> str | None:
        """Return why contact with other ranks may be lost; None if all of them send heartbeats."""
        if self.store is None:
            return None
        known = _within(ANSWER, self._poll_for_losses)
        return _unreachable() if known is None else describe_lost_rank(known, self.rank, 2.5 * self.interval)

    def _poll_for_losses(self) -> dict[int, PeerStatus]:
        """Return the status of all ranks after a few intervals, or as soon as one reports a failure."""
        known = self._read_heartbeats()
        for _ in range(4):
            time.sleep(self.interval)
            known = self._read_heartbeats()
            if any(seen.beat.failed for rank, seen in known.items() if rank != self.rank):
                break
        return known

    def _send_heartbeats(self) -> None:
        looks_around = int(os.environ.get("LOCAL_RANK", 0)) == 0  # one rank per host is enough
        while not self._ended.wait(self.interval):
            # RuntimeError: the store cannot be reached; if that blocks the rank, the other thread notices
            with contextlib.suppress(RuntimeError):
                self._send_heartbeat()
                if looks_around and self._number % 5 == 0:
                    self._check_peers(self._read_heartbeats())

    def _check_peers(self, known: dict[int, PeerStatus]) -> None:
        others = {rank: seen for rank, seen in known.items() if rank != self.rank}
        failed = [seen for seen in others.values() if seen.beat.failed]
        if any(seen.silent > 10 * self.interval for seen in failed):
            # NCCL kernels wait forever for a failed rank, so this is the only notice
            self._end(describe_lost_rank(known, self.rank, self.limit))
        elif any(seen.silent > self.limit and not seen.beat.left for seen in others.values()):
            self._end(describe_hang(known, self.limit / 2))

    def _check_own_progress(self) -> None:
        while not self._ended.wait(self.interval):
            if time.monotonic() - self._since > self.limit * self._timeout_factor:
                self._end(_within(ANSWER, self._diagnosis) or _unreachable())

    def _diagnosis(self) -> str:
        """Wait until silent ranks can be identified, then describe the hang."""
        self._read_heartbeats()
        time.sleep(3 * self.interval)
        return describe_hang(self._read_heartbeats(), 2.5 * self.interval)

    def _end(self, why: str) -> None:
        if not self._ended.is_set():
            self.leave(why)
            self.on_hang(why)

    def _send_heartbeat(self) -> None:
        with self._lock:
            self._number += 1
            stands = time.monotonic() - self._since > 2 * self.interval
            where, waiting = _where(self._main) if stands else ("", False)
            beat = Heartbeat(
                self._number, self._host, os.getpid(), self._phases, self._phase, where, waiting, self._left
            )
            self.store.set(str(self.rank), self._signed(json.dumps(asdict(beat))))

    def _read_heartbeats(self) -> dict[int, PeerStatus]:
        """Return the status of every rank that has sent a heartbeat."""
        ranks = range(self.size)
        if len(self._seen) < self.size:
            ranks = [rank for rank in ranks if rank in self._seen or self.store.check([str(rank)])]
        now = time.monotonic()
        for rank, text in zip(ranks, self.store.multi_get([str(rank) for rank in ranks]), strict=True):
            beat = self._verified(rank, text)
            before = self._seen.get(rank)
            if beat is not None and (before is None or beat.number > before[0].number):
                self._seen[rank] = beat, now
        return {rank: PeerStatus(beat, now - since) for rank, (beat, since) in sorted(self._seen.items())}

    def _signed(self, text: str) -> str:
        return f"{self._signature(self.rank, text)} {text}"

    def _signature(self, rank: int, text: str) -> str:
        """Return the signature of a heartbeat; "-" before the ranks share a key."""
        return hmac.digest(self._secret, f"{rank} {text}".encode(), "sha256").hex() if self._secret else "-"

    def _verified(self, rank: int, content: bytes) -> Heartbeat | None:
        """Return the heartbeat of a rank; None if its signature or content is invalid."""
        try:
            signature, _, text = content.decode().partition(" ")
            if hmac.compare_digest(signature, self._signature(rank, text)):
                beat = Heartbeat(**json.loads(text))
                numbers, words = (beat.number, beat.phases, beat.process), (beat.host, beat.phase, beat.where)
                whole = all(type(one) is int for one in numbers) and all(isinstance(one, str) for one in words)
                return beat if whole and isinstance(beat.left, str | None) else None
        except (ValueError, TypeError, RecursionError):
            pass
        return None


def _within(seconds: float, action: Callable):
    """Return the result of an action; None on a timeout or if the store cannot be reached."""
    found = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def describe_hang(known: dict[int, PeerStatus], silence: float) -> str:
    """Describe the rank that the others wait for, and where they wait.

    This is a rank without a heartbeat for ``silence`` seconds, else a rank that computes while the others wait, else a
    rank in an earlier phase.
    """
    silent = [rank for rank, seen in known.items() if seen.silent > silence and not seen.beat.left]
    heard = {rank: seen.beat for rank, seen in known.items() if rank not in silent and not seen.beat.left}
    if silent:
        return f"{_describe_silent(known, silent)}{_describe_waiting(heard)}"
    working = [rank for rank, beat in heard.items() if not beat.waiting]
    least = min((beat.phases for beat in heard.values()), default=0)
    behind = [rank for rank, beat in heard.items() if beat.phases == least]
    late = next((group for group in (working, behind) if 0 < len(group) < len(heard)), None)
    if late is None:
        rank, beat = next(iter(heard.items()))
        return f"no rank makes progress; rank {rank} is waiting in {_describe_place(beat)}"
    named = _list(known, late)
    first = heard[late[0]]
    rest = {rank: beat for rank, beat in heard.items() if rank not in late}
    return f"{named} {_is(late)} stuck in {_describe_place(first)}{_describe_waiting(rest)}"


def describe_lost_rank(known: dict[int, PeerStatus], me: int, silence: float) -> str | None:
    """Describe a failed rank, else the ranks without a heartbeat for ``silence`` seconds; None: there are none."""
    ended = [rank for rank, seen in known.items() if rank != me and seen.beat.failed]
    if ended:
        first = known[ended[0]].beat
        return f"rank {ended[0]} ({first.host}) ended: {first.left}"
    silent = [rank for rank, seen in known.items() if rank != me and seen.silent > silence and not seen.beat.left]
    return _describe_silent(known, silent) if silent else None


def _describe_silent(known: dict[int, PeerStatus], silent: list[int]) -> str:
    last = known[silent[0]].beat.phase
    return f"{_list(known, silent)} no longer {_responds(silent)}; last heartbeat in {last}"


def _describe_waiting(heard: dict[int, Heartbeat]) -> str:
    if not heard:
        return ""
    rank, beat = next(iter(heard.items()))
    many = f"; {len(heard)} others wait, rank {rank}" if len(heard) > 1 else f"; rank {rank} waits"
    return f"{many} in {_describe_place(beat)}"


def _describe_place(beat: Heartbeat) -> str:
    return f"{beat.phase} ({beat.where})" if beat.where else beat.phase


def _list(known: dict[int, PeerStatus], ranks: list[int]) -> str:
    named = [f"rank {rank} ({known[rank].beat.host}, process {known[rank].beat.process})" for rank in ranks[:4]]
    return ", ".join(named) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def _is(ranks: list[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _responds(ranks: list[int]) -> str:
    return "responds" if len(ranks) == 1 else "respond"


def _unreachable() -> str:
    return f"the job's first node ({os.environ.get('MASTER_ADDR')}) cannot be reached"


def _where(thread: int) -> tuple[str, bool]:
    """Return where a thread is (function, and the line of this package that called it), and if it waits for others.

    faulthandler reads the frames of other threads without creating objects. sys._current_frames creates frame objects,
    which outlive the call and keep its variables alive; Python 3.12.1 crashed in it.
    """
    with open(os.memfd_create("stack"), "w+b") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        stacks = _stacks(file.read().decode(errors="replace"))
    frames = stacks.get(thread, [])
    if frames and frames[0].function == "_engine_run_backward":  # the backward pass runs in a thread of autograd
        others = (inner for other, inner in stacks.items() if other not in (thread, threading.get_ident()))
        frames = next((inner for inner in others if any(frame.ours for frame in inner)), frames)
    if not frames:
        return "", False
    waiting = any(part in frames[0].file for part in _WAITING)
    ours = next((frame for frame in frames if frame.ours), None)
    if ours is None:
        return frames[0].function, waiting
    line = f"{Path(ours.file).relative_to(PACKAGE)}:{ours.line}"
    return (line if ours is frames[0] else f"{frames[0].function} at {line}"), waiting


class _Frame(NamedTuple):
    file: str
    line: str
    function: str

    @property
    def ours(self) -> bool:
        """Return True if the frame's file belongs to this package."""
        return self.file.startswith(f"{PACKAGE}/")


def _stacks(text: str) -> dict[int, list[_Frame]]:
    """Parse the output of faulthandler; return frames by thread, the innermost first."""
    stacks, frames = {}, []
    for line in text.splitlines():
        if thread := re.match(r"(?:Thread|Current thread) (0x[0-9a-f]+)", line):
            frames = stacks.setdefault(int(thread[1], 16), [])
        elif frame := re.match(r'\s*File "(.*)", line (\S+) in (.*)', line):
            frames.append(_Frame(*frame.groups()))
    return stacks
