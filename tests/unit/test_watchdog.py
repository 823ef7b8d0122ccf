"""What a watch says of ranks, by what they told last."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from inplace_ttt.resilience.watchdog import (
    DONE,
    Heartbeat,
    PeerStatus,
    Watchdog,
    _where,
    describe_hang,
    describe_lost_rank,
)


def seen(
    phases: int = 5, silent: float = 0.0, *, waiting: bool = True, where: str = "", left: str | None = None
) -> PeerStatus:
    return PeerStatus(Heartbeat(1, "", 0, phases, f"micro batch {phases}", where, waiting, left), silent)


def ranks(*everyone: PeerStatus) -> dict[int, PeerStatus]:
    for rank, one in enumerate(everyone):
        one.beat.host, one.beat.process = f"node{rank // 2}", 70 + rank
    return dict(enumerate(everyone))


def test_a_silent_rank_is_named_and_where_the_others_wait():
    known = ranks(seen(), seen(silent=9.0), seen(where="all_reduce at loop.py:3"), seen())
    assert describe_hang(known, 3.0) == (
        "rank 1 (node0, process 71) no longer responds; last heartbeat in micro batch 5; "
        "3 others wait, rank 0 in micro batch 5"
    )


def test_a_rank_at_work_is_what_the_others_wait_for():
    known = ranks(seen(where="wait at ring.py:1"), seen(), seen(waiting=False, where="data/packed.py:88"), seen())
    assert describe_hang(known, 3.0).startswith(
        "rank 2 (node1, process 72) is stuck in micro batch 5 (data/packed.py:88); 3 others wait"
    )


def test_else_the_rank_behind_the_others():
    known = ranks(seen(), seen(), seen(), seen(phases=4))
    assert describe_hang(known, 3.0).startswith("rank 3 (node1, process 73) is stuck in micro batch 4; 3 others")


def test_where_all_wait_alike_nobody_is_blamed():
    assert describe_hang(ranks(seen(), seen()), 3.0) == "no rank makes progress; rank 0 is waiting in micro batch 5"


def test_many_silent_ranks_are_counted():
    known = ranks(*(seen(silent=9.0 if rank else 0.0) for rank in range(8)))
    said = describe_hang(known, 3.0)
    assert "rank 4 (node2, process 74) and 3 more no longer respond" in said and said.endswith(
        "rank 0 waits in micro batch 5"
    )


def test_who_ended_with_a_reason_explains_more_than_who_is_silent():
    known = ranks(seen(), seen(left=DONE), seen(silent=9.0), seen(left="the disk is full"))
    assert describe_lost_rank(known, 0, 3.0) == "rank 3 (node1) ended: the disk is full"
    known[3].beat.left = DONE
    assert describe_lost_rank(known, 0, 3.0).startswith("rank 2 (node1, process 72) no longer responds")
    known[2].silent = 0.0
    assert describe_lost_rank(known, 0, 3.0) is None


def test_where_a_thread_stands():
    inside, leave = threading.Event(), threading.Event()

    def stands_here():
        inside.set()
        leave.wait()

    thread = threading.Thread(target=stands_here)
    thread.start()
    inside.wait()
    time.sleep(0.1)
    assert _where(thread.ident) == ("wait", False)
    leave.set()
    thread.join()
    assert _where(-1) == ("", False)


@pytest.fixture
def store():
    import torch.distributed as dist

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False)


def test_a_watch_ends_a_rank_that_stands_still(store):
    """Two watches of one process: one rank goes on, the other does not."""
    said = []
    stands = Watchdog(0, 2, 1.0, said.append, store())
    goes_on = Watchdog(1, 2, 1.0, said.append, store())
    stands.set_phase("step 7")
    deadline = time.monotonic() + 10
    while not said and time.monotonic() < deadline:
        goes_on.set_phase("step 8")
        time.sleep(0.05)
    goes_on.leave()
    assert len(said) == 1 and f"process {os.getpid()}" in said[0] and "step 7" in said[0]


def test_patience_is_a_multiple_of_the_limit(store):
    said = []
    watch = Watchdog(0, 1, 0.3, said.append, store())
    watch.set_phase("loading", timeout_factor=1000)
    time.sleep(1.5)
    watch.leave()
    assert not said


def test_a_forged_beat_ends_nothing(store):
    """Whoever reaches the store can write to it; what is not signed by the rank is no beat."""
    shared, said = store(), []
    mine, other = (Watchdog(rank, 2, 60.0, said.append, shared) for rank in range(2))
    try:
        for watch in (mine, other):
            watch._secret = b"known to the ranks alone"
            watch._send_heartbeat()
        assert mine._read_heartbeats()[1].beat.left is None
        honest = json.loads(shared.get("1").decode().partition(" ")[2])
        forged = json.dumps({**honest, "number": 10**9, "left": "I say so"})
        stolen = shared.get("0").decode().partition(" ")[0]
        for content in (
            forged,
            f"- {forged}",
            f"{stolen} {forged}",
            "",
            "x" * 1000,
            f"{other._signature(0, forged)} {forged}",
        ):
            shared.set("1", content)
            assert mine._read_heartbeats()[1].beat.left is None, content
        shared.set("1", shared.get("1").decode())
        other._send_heartbeat()
        assert mine._read_heartbeats()[1].beat.number < 10**9
        other.leave("the disk is full")
        assert mine._read_heartbeats()[1].beat.left == "the disk is full"
    finally:
        mine.leave()
        other.leave()
    assert not said


def test_ranks_leave_together(store):
    said = []
    first, last = (Watchdog(rank, 2, 60.0, said.append, store()) for rank in range(2))
    thread = threading.Thread(target=first.finish)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and not first._ended.is_set()
    last.finish()
    thread.join(5.0)
    assert not thread.is_alive() and not said


def test_a_rank_that_hangs_while_another_is_done_is_noticed(store):
    """The other is the only one that is left to notice it."""
    said = []
    done = Watchdog(1, 2, 0.5, said.append, store())
    hangs = Watchdog(0, 2, 60.0, said.append, store())
    hangs.set_phase("drawing")
    hangs._send_heartbeat()
    hangs._ended.set()  # as if it were stopped
    done.finish()
    assert len(said) == 1 and f"process {os.getpid()}" in said[0] and said[0].endswith("last heartbeat in drawing")


def test_a_store_that_is_gone_ends_the_wait():
    import torch.distributed as dist

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = []
    watch = Watchdog(1, 2, 60.0, said.append, dist.TCPStore("127.0.0.1", server.port, is_master=False))
    del server
    watch.finish()
    assert not said


def test_frames_of_this_package_are_known_wherever_they_are():
    from inplace_ttt import ttt
    from inplace_ttt.resilience.watchdog import PACKAGE

    assert Path(ttt.__file__).is_relative_to(PACKAGE) and PACKAGE.name == "inplace_ttt"
