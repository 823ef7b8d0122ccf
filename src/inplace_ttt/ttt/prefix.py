"""The exchange of chunk state between context-parallel ranks: a ring, pipelined over row blocks.

The state that a slice starts from is the sum of what all earlier slices wrote to the same document: an exclusive
prefix sum over slices, whose transition is the identity. The running sum goes up the ranks (slices 0 .. n-1), turns
at rank n-1, which holds slices n-1 and n, and comes back down (slices n .. 2n-1). A hop exists only where a document
crosses the edge between two slices; where one starts anew, nothing is waited for.

The rows of the state are independent of each other, so it travels in blocks: while one is on the wire, the next is
computed. Every transfer is a non-blocking send or receive; with NCCL they run on streams of their own. Every rank
walks stops and blocks in the same order, and sends of a stop are posted before receives of the next, so no two ranks
ever wait for each other.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt.plan import Stop


class PrefixRing:
    """One sweep's exchange: take out the sum that came before a slice, hand in the sum that goes on from it.

    For each stop ``open``, then for each block ``get`` and ``put``, in this order on every rank; at the end ``finish``.
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
        self.turned: dict[int, Tensor] = {}  # by block: what this rank hands to itself at the turn
        self.receives: dict[int, tuple[Tensor, dist.Work]] = {}
        self.sends: list[tuple[Tensor, dist.Work]] = []

    def open(self, stop: int) -> None:
        """Have all blocks of a stop that come from another rank on their way."""
        source = self.stops[stop].source
        if source is None or source == self.rank:
            return
        for block, shape in enumerate(self.shapes):
            buffer = torch.empty(shape, dtype=self.comm_dtype, device=self.device)
            work = dist.irecv(buffer, dist.get_global_rank(self.group, source), group=self.group, tag=block)
            self.receives[block] = buffer, work

    def get(self, stop: int, block: int) -> Tensor | None:
        """(rows, f): the sum over all earlier slices of the document that this slice starts in; None: there is none."""
        source = self.stops[stop].source
        if source is None:
            return None
        if source == self.rank:
            return self.turned.pop(block)
        buffer, work = self.receives.pop(block)
        work.wait()  # with NCCL the current stream waits, not this process
        return buffer.to(self.dtype)

    def put(self, stop: int, block: int, running: Tensor) -> None:
        """Pass on the sum (rows, f) that the next slice starts from; not to be changed until ``finish``."""
        target = self.stops[stop].target
        if target == self.rank:
            self.turned[block] = running
            return
        message = running.to(self.comm_dtype).contiguous()
        work = dist.isend(message, dist.get_global_rank(self.group, target), group=self.group, tag=block)
        self.sends.append((message, work))

    def let_go(self) -> None:
        """Have the device send before it goes on: a large product that starts first would keep the transfer, which
        runs on the same processors, from starting until it ends."""
        if self.device.type == "cuda":
            self.finish()

    def finish(self) -> None:
        """Wait until everything sent may be forgotten (with NCCL: have the current stream wait)."""
        for _, work in self.sends:
            work.wait()
        self.sends.clear()
