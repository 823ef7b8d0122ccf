"""The exchange of chunk state between context-parallel ranks: a ring, pipelined over row blocks.

The state that a slice starts from is the sum of what all earlier slices wrote to the same document: an exclusive
prefix sum over slices, whose transition is the identity. The running sum goes up the ranks (slices 0 .. n-1), turns
at rank n-1, which holds slices n-1 and n, and comes back down (slices n .. 2n-1). A hop exists only where a document
crosses the edge between two slices; where one starts anew, nothing is waited for.

The rows of the state are independent of each other, so it travels in blocks: while one is on the wire, others are
computed. Every transfer is a non-blocking send or receive. With CUDA, receiving, adding and sending are queued on a
stream of their own as soon as a slice's sum is known; elsewhere a sum is passed on when its block is asked for.
Every rank walks stops and blocks in the same order, so no two ever wait for each other.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt.plan import Stop


class PrefixRing:
    """One sweep's exchange: hand in each slice's own sum, take out the sum that came before the slice.

    Call ``put`` for all blocks of stop 0, then of stop 1; then ``get`` in the same order; then ``finish``.
    Where no stop has a source or a target nothing is exchanged and ``group`` may be None.
    """

    def __init__(
        self,
        stops: tuple[Stop, ...],
        shapes: list[tuple[int, int]],  # (rows, f) of each block
        *,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,  # of the sums
        comm_dtype: torch.dtype,  # on the wire
        device: torch.device,
    ):
        self.stops, self.shapes, self.group = stops, shapes, group
        self.dtype, self.comm_dtype, self.device = dtype, comm_dtype, device
        self.rank = 0 if group is None else group.rank()
        self.stream = _comm_stream(device) if group is not None and device.type == "cuda" else None
        self.own: dict[tuple[int, int], Tensor] = {}
        self.carries: dict[tuple[int, int], Tensor] = {}
        self.receives: dict[tuple[int, int], tuple[Tensor, dist.Work]] = {}
        self.sends: list[tuple[Tensor, dist.Work]] = []
        self.ready: dict[tuple[int, int], torch.cuda.Event] = {}  # the carry's, on the exchange's own stream
        if self.stream is None:  # receives match by tag: all may be open from the start
            for stop in range(len(stops)):
                for block in range(len(shapes)):
                    self._open(stop, block)

    def put(self, stop: int, block: int, own: Tensor | None) -> None:
        """Hand in what this slice itself wrote to the document that goes on: (rows, f); None if none does."""
        if own is not None:
            self.own[stop, block] = own
        if self.stream is None:
            if not self.stops[stop].passes:
                self._send(stop, block)
            return
        if own is not None:
            own.record_stream(self.stream)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.stops[stop].passes:
                self._carry(stop, block)
            self._send(stop, block)
            self._carry(stop, block)
            self.ready[stop, block] = self.stream.record_event()

    def get(self, stop: int, block: int) -> Tensor | None:
        """The sum over all earlier slices of the document that this slice starts in; None if it starts here."""
        if self.stops[stop].source is None:
            return None
        if self.stream is None:
            carry = self._carry(stop, block)
            if self.stops[stop].passes:
                self._send(stop, block)
            return carry
        carry, ready = self.carries[stop, block], self.ready[stop, block]
        torch.cuda.current_stream().wait_event(ready)
        carry.record_stream(torch.cuda.current_stream())
        return carry

    def finish(self) -> None:
        """Wait until everything sent may be forgotten (with CUDA: have the exchange's own stream wait)."""
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            for _, work in self.sends:
                work.wait()
        self.sends.clear()

    def _open(self, stop: int, block: int) -> None:
        """Post the receive of a block's running sum, if it comes from another rank."""
        source = self.stops[stop].source
        if source is None or source == self.rank:
            return
        buffer = torch.empty(self.shapes[block], dtype=self.comm_dtype, device=self.device)
        work = dist.irecv(buffer, dist.get_global_rank(self.group, source), group=self.group, tag=block)
        self.receives[stop, block] = buffer, work

    def _carry(self, stop: int, block: int) -> Tensor | None:
        key = stop, block
        if self.stops[stop].source is None or key in self.carries:
            return self.carries.get(key)  # what comes from this very rank is there since the turn
        if key not in self.receives:
            self._open(stop, block)
        buffer, work = self.receives.pop(key)
        work.wait()
        self.carries[key] = buffer.to(self.dtype)
        return self.carries[key]

    def _send(self, stop: int, block: int) -> None:
        """Pass the running sum on: to the next rank, or at the turn to this rank's own next slice."""
        running = self.own.pop((stop, block), None)
        if running is None:
            return
        if self.stops[stop].passes:
            running = running + self.carries[stop, block]
        target = self.stops[stop].target
        if target == self.rank:
            self.carries[stop + 1, block] = running
            return
        message = running.to(self.comm_dtype).contiguous()
        work = dist.isend(message, dist.get_global_rank(self.group, target), group=self.group, tag=block)
        self.sends.append((message, work))


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _comm_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
