"""The exchange of chunk state between context-parallel ranks: a ring, pipelined over row blocks.

The state that a slice starts from is the sum of what all earlier slices wrote to the same document: an exclusive
prefix sum over slices, whose transition is the identity. The running sum goes up the ranks (slices 0 .. n-1), turns
at rank n-1, which sweeps slices n-1 and n as one, and comes back down (slices n .. 2n-1). A hop exists only where a
document crosses the edge between two ranks' slices; where one starts anew, nothing is waited for.

The rows of the state are independent of each other, so it travels in blocks: while one is on the wire, the next is
computed. What carries a block from rank to rank is a *wire*: messages (below), or memory that the ranks of one host
map into each other (``mailbox.py``). In each direction blocks go in one order, that of batch rows and rows; a slice
waits for nothing but slices before it in the sweep, so no two ranks ever wait for each other.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt.plan import Stop


class Wire(Protocol):
    """Carries numbered blocks between two ranks of a group; ``peer`` is a rank of the group."""

    def expect(self, peer: int, number: int, block: Tensor) -> None:
        """A block will come that is to be written to this memory."""

    def take(self, peer: int, number: int) -> None:
        """What is called next sees the block."""

    def send(self, peer: int, number: int, block: Tensor) -> None:
        """Have a block, which is not to be changed until ``finish``, on its way."""

    def let_go(self) -> None:
        """Called before large products."""

    def finish(self) -> None:
        """What is called next may change what was sent."""


class Messages:
    """A wire of non-blocking sends and receives, on any backend; with NCCL they run on streams of their own."""

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype):
        self.group, self.dtype = group, dtype
        self.expected: dict[int, tuple[Tensor, Tensor, dist.Work]] = {}
        self.sent: list[tuple[Tensor, dist.Work]] = []

    def expect(self, peer: int, number: int, block: Tensor) -> None:
        message = block if block.dtype == self.dtype else torch.empty_like(block, dtype=self.dtype)
        work = dist.irecv(message, dist.get_global_rank(self.group, peer), group=self.group, tag=number)
        self.expected[number] = block, message, work

    def take(self, peer: int, number: int) -> None:
        block, message, work = self.expected.pop(number)
        work.wait()  # with NCCL the current stream waits, not this process
        if message is not block:
            block.copy_(message)

    def send(self, peer: int, number: int, block: Tensor) -> None:
        message = block.to(self.dtype)
        work = dist.isend(message, dist.get_global_rank(self.group, peer), group=self.group, tag=number)
        self.sent.append((message, work))

    def let_go(self) -> None:
        # A product that starts first would keep NCCL, which runs on the same processors, from starting until it ends.
        if dist.get_backend(self.group) == "nccl":
            self.finish()

    def finish(self) -> None:
        for _, work in self.sent:
            work.wait()
        self.sent.clear()


class PrefixRing:
    """One sweep's exchange: take out the sum that came before a stop, hand in the sum that goes on from it.

    ``open`` each stop before its first ``get``; for each row of the batch and each block, in this order, ``get`` where
    a document comes in, and ``going`` and ``put`` where one goes on; at the end ``finish``.
    """

    def __init__(
        self,
        stops: tuple[Stop, ...],
        blocks: list[slice],  # of the rows
        shape: tuple[int, int, int],  # (b, d, f)
        *,
        wire: Wire,
        dtype: torch.dtype,  # of the sums
        device: torch.device,
    ):
        self.stops, self.blocks, self.shape, self.wire = stops, blocks, shape, wire
        self.options = dict(dtype=dtype, device=device)
        self.came: dict[int, Tensor] = {}  # by stop: (b, d, f), the sums that it starts from
        self.goes: dict[int, Tensor] = {}  # by stop: (b, d, f), the sums that the next one starts from

    def open(self, stop: int) -> None:
        """Have all that a stop receives on its way, and memory for what it passes on."""
        source, target = self.stops[stop].source, self.stops[stop].target
        if target is not None:
            self.goes[stop] = torch.empty(self.shape, **self.options)
        if source is not None:
            self.came[stop] = torch.empty(self.shape, **self.options)
            for number, block in self._numbered(self.came[stop]):
                self.wire.expect(source, number, block)

    def get(self, stop: int, batch: int, block: int) -> Tensor:
        """(rows, f): the sum over all earlier stops of the document that this one starts in."""
        self.wire.take(self.stops[stop].source, batch * len(self.blocks) + block)
        return self.came[stop][batch, self.blocks[block]]

    def going(self, stop: int, batch: int, block: int) -> Tensor:
        """(rows, f): where the sum that the next stop starts from is to be written."""
        return self.goes[stop][batch, self.blocks[block]]

    def put(self, stop: int, batch: int, block: int) -> None:
        """Pass on what was written; it is not to be changed until ``finish``."""
        number = batch * len(self.blocks) + block
        self.wire.send(self.stops[stop].target, number, self.going(stop, batch, block))

    def let_go(self) -> None:
        """Have the device send before it goes on."""
        self.wire.let_go()

    def finish(self) -> None:
        """Wait until everything sent may be forgotten (on a GPU: have the current stream wait)."""
        self.wire.finish()

    def _numbered(self, state: Tensor):
        parts = (rows[block] for rows in state for block in self.blocks)
        return enumerate(parts)


class Replay:
    """A ring that has been round: the sums that came then, and nothing is exchanged."""

    def __init__(self, came: dict[int, Tensor], blocks: list[slice]):
        self.came, self.blocks = came, blocks

    def open(self, stop: int) -> None: ...

    def get(self, stop: int, batch: int, block: int) -> Tensor:
        return self.came[stop][batch, self.blocks[block]]

    def going(self, stop: int, batch: int, block: int) -> None: ...

    def put(self, stop: int, batch: int, block: int) -> None: ...

    def let_go(self) -> None: ...

    def finish(self) -> None: ...
