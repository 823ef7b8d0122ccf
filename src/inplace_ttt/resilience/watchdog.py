"""Notice that a rank hangs, and say which one it is and where the others wait for it.

A collective waits for the slowest of its ranks: where one is stopped or cut off, all stand still and none knows why.
So every rank marks what it goes about, and a thread beside it tells the job's store every second that it is there and
what it does. When a rank's marks stand still for too long, or another rank is silent for as long, it reads what all
have told and ends the job in a sentence. Only durations of a machine's own monotonic clock count: clocks may differ,
and may jump.

Where the network is cut the store's client may wait for ever. So a second thread watches the marks, and whatever it
asks the store is given some seconds.

The store is open to whoever reaches its port. Once the ranks are joined they sign what they tell with a key that they
share through the process group, and the store never holds.
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

# Innermost Python frames of a rank that waits for others, rather than being what others wait for
_WAITING = ("torch/distributed/", "ttt/transport/", "p2p_communication.py", "tensor_parallel/mappings")
PACKAGE = Path(inplace_ttt.__file__).parent
ANSWER = 10.0  # seconds in which the store answers, if it is reached
DONE = "done"  # why a rank ends that has nothing to complain of


@dataclass
class Heartbeat:
    """Hold what a rank tells of itself."""

    number: int  # grows with every beat
    host: str
    process: int
    phases: int  # how many it has set
    phase: str  # the last one
    where: str  # in the code, where it has stood for a while
    waiting: bool  # for other ranks; likewise
    left: str | None = None  # why it ended, once it has

    @property
    def failed(self) -> bool:
        return self.left not in (None, DONE)


@dataclass
class PeerStatus:
    """Hold what is known of another rank: its last beat, and for how many seconds it has been the last."""

    beat: Heartbeat
    silent: float


class Watchdog:
    """Watch the other ranks, for one rank. ``mark`` costs nothing; without a job's store nothing is watched."""

    INTERVAL = 1.0  # seconds between beats

    def __init__(self, rank: int, size: int, limit: float, on_hang: Callable[[str], None], store=None):
        """``on_hang`` is called in the watching thread with a sentence, and ends the process. ``limit``: seconds."""
        self.rank, self.size, self.limit, self.on_hang, self.store = rank, size, limit, on_hang, store
        self.interval = min(self.INTERVAL, limit / 10)
        self._phases, self._phase, self._since, self._timeout_factor = 0, "starting", time.monotonic(), 1.0
        self._main, self._host = threading.get_ident(), socket.gethostname()
        self._number, self._left = 0, None
        self._secret: bytes | None = None
        self._seen: dict[int, tuple[Heartbeat, float]] = {}  # of each rank: its last beat, and when that was new
        self._lock, self._ended = threading.Lock(), threading.Event()
        if store is not None:
            self._send_heartbeat()
            for name, run in (("tell", self._send_heartbeats), ("guard", self._check_own_progress)):
                threading.Thread(target=run, name=name, daemon=True).start()

    @classmethod
    def join(
        cls, world: World, limit: float, on_hang: Callable[[str], None], rendezvous: Rendezvous | None
    ) -> "Watchdog":
        """Watch through the job's store, on a connection of its own; a process that is alone watches nothing."""
        store = None
        if rendezvous is not None:
            store = dist.PrefixStore("watch", rendezvous.connect())
        return cls(world.rank, world.size, limit, on_hang, store)

    def share_secret(self) -> None:
        """Give all ranks a key to sign their beats with, through the process group: every rank calls it.

        Whoever reaches the store can write to it. From here on a beat that is not signed with the key is no beat.
        """
        if self.store is not None:
            secret = [secrets.token_bytes(32)]
            dist.broadcast_object_list(secret, src=0)
            for beat, _ in list(self._seen.values()):  # what anyone may have written; all ranks are here now
                beat.number, beat.left = -1, None
            self._secret = secret[0]
            self._send_heartbeat()

    def set_phase(self, phase: str, timeout_factor: float = 1.0) -> None:
        """Note what the rank does now, and how many times the limit it may take."""
        self._phases, self._phase, self._timeout_factor, self._since = (
            self._phases + 1,
            phase,
            timeout_factor,
            time.monotonic(),
        )

    def leave(self, why: str = DONE) -> None:
        """End watching, and tell the others why this rank ends: they will lose contact with it."""
        if self.store is not None and not self._ended.is_set():
            self._left = why
            _within(ANSWER, self._send_heartbeat)
            self._ended.set()

    def finish(self) -> None:
        """Leave with the others: wait until no rank is at work any more.

        Whoever left at once could not notice that another rank hangs in what it does last, and nobody else would.
        """
        if self.store is None:
            return
        self.set_phase("waiting for the other ranks to finish", math.inf)
        self._left = DONE
        _within(ANSWER, self._send_heartbeat)
        while not self._ended.is_set():
            known = _within(ANSWER, self._read_heartbeats)
            # None: the store is gone, which the first rank may have opened: it waits for all others
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
        """Why contact with others may be lost: a sentence, or None where all are heard from."""
        if self.store is None:
            return None
        known = _within(ANSWER, self._poll_for_losses)
        return _unreachable() if known is None else describe_lost_rank(known, self.rank, 2.5 * self.interval)

    def _poll_for_losses(self) -> dict[int, PeerStatus]:
        """Return what ranks tell, after some beats or as soon as one says why it ended."""
        known = self._read_heartbeats()
        for _ in range(4):
            time.sleep(self.interval)
            known = self._read_heartbeats()
            if any(seen.beat.failed for rank, seen in known.items() if rank != self.rank):
                break
        return known

    def _send_heartbeats(self) -> None:
        looks_around = int(os.environ.get("LOCAL_RANK", 0)) == 0  # one of a machine is enough
        while not self._ended.wait(self.interval):
            # RuntimeError: the store is not reached; if that stops the rank, the guard sees it
            with contextlib.suppress(RuntimeError):
                self._send_heartbeat()
                if looks_around and self._number % 5 == 0:
                    self._check_peers(self._read_heartbeats())

    def _check_peers(self, known: dict[int, PeerStatus]) -> None:
        others = {rank: seen for rank, seen in known.items() if rank != self.rank}
        failed = [seen for seen in others.values() if seen.beat.failed]
        if any(seen.silent > 10 * self.interval for seen in failed):
            # who waits for a rank that has failed may not hear of it otherwise: NCCL's kernels go on waiting
            self._end(describe_lost_rank(known, self.rank, self.limit))
        elif any(seen.silent > self.limit and not seen.beat.left for seen in others.values()):
            self._end(describe_hang(known, self.limit / 2))

    def _check_own_progress(self) -> None:
        while not self._ended.wait(self.interval):
            if time.monotonic() - self._since > self.limit * self._timeout_factor:
                self._end(_within(ANSWER, self._diagnosis) or _unreachable())

    def _diagnosis(self) -> str:
        """Looks for as long as it takes to tell who is silent."""
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
        """Return what every rank that has told anything told last."""
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
        """Sign a rank's beat; before the ranks share a key the signature is empty."""
        return hmac.digest(self._secret, f"{rank} {text}".encode(), "sha256").hex() if self._secret else "-"

    def _verified(self, rank: int, content: bytes) -> Heartbeat | None:
        """Return the beat that a rank wrote, or None where its signature is not the rank's."""
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
    """Return what an action returns; None where it takes longer, or the store is not reached."""
    found = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def describe_hang(known: dict[int, PeerStatus], silence: float) -> str:
    """The rank that the others wait for, and where: silent for longer than ``silence`` seconds, else at work while the
    others wait, else behind them."""
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
        return f"no rank goes on; rank {rank} waits in {_describe_place(beat)}"
    named = _list(known, late)
    first = heard[late[0]]
    rest = {rank: beat for rank, beat in heard.items() if rank not in late}
    return f"{named} {_does(late)} not go on from {_describe_place(first)}{_describe_waiting(rest)}"


def describe_lost_rank(known: dict[int, PeerStatus], me: int, silence: float) -> str | None:
    """Return why ranks that cannot be reached ended, else which are not heard from; None: all are there."""
    ended = [rank for rank, seen in known.items() if rank != me and seen.beat.failed]
    if ended:
        first = known[ended[0]].beat
        return f"rank {ended[0]} ({first.host}) ended: {first.left}"
    silent = [rank for rank, seen in known.items() if rank != me and seen.silent > silence and not seen.beat.left]
    return _describe_silent(known, silent) if silent else None


def _describe_silent(known: dict[int, PeerStatus], silent: list[int]) -> str:
    last = known[silent[0]].beat.phase
    return f"{_list(known, silent)} {_does(silent)} not answer any more, last heard of in {last}"


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


def _does(ranks: list[int]) -> str:
    return "does" if len(ranks) == 1 else "do"


def _unreachable() -> str:
    return f"the job's first node ({os.environ.get('MASTER_ADDR')}) cannot be reached"


def _where(thread: int) -> tuple[str, bool]:
    """The function that a thread is in and the line of ours that called it; whether it waits for other ranks.

    faulthandler reads other threads' frames as they lie. sys._current_frames would make objects of them, which outlive
    the call that they are of, and with it what that call holds: Python 3.12.1 crashed of it.
    """
    with open(os.memfd_create("stack"), "w+b") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        stacks = _stacks(file.read().decode(errors="replace"))
    frames = stacks.get(thread, [])
    if frames and frames[0].function == "_engine_run_backward":  # autograd's own thread does the work
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
        return self.file.startswith(f"{PACKAGE}/")


def _stacks(text: str) -> dict[int, list[_Frame]]:
    """Frames by thread, the innermost first, out of what faulthandler writes."""
    stacks, frames = {}, []
    for line in text.splitlines():
        if thread := re.match(r"(?:Thread|Current thread) (0x[0-9a-f]+)", line):
            frames = stacks.setdefault(int(thread[1], 16), [])
        elif frame := re.match(r'\s*File "(.*)", line (\S+) in (.*)', line):
            frames.append(_Frame(*frame.groups()))
    return stacks
