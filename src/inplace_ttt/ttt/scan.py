"""The scan over a rank's stages: receive a carry, yield chunk weights, send a carry.

The state that a slice starts from is the sum of what all earlier slices wrote to the same document: an exclusive prefix
sum over slices. The carry goes up the ranks (slices 0 .. n-1), turns at rank n-1, which scans slices n-1 and n as one
stage, and comes back down (slices n .. 2n-1). A message exists only where a document crosses the edge between two
ranks' slices.

The rows of the state are independent, so they are scanned in blocks: while the carry of one block is sent, the next
block is scanned. The chunk weights of as many blocks as ``max_window_bytes`` allows are then used together, because
large products are faster than small ones.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt.backends import Backend
from inplace_ttt.ttt.plan import CALLER, ScanStage
from inplace_ttt.ttt.products import row_edges, state_dtype
from inplace_ttt.ttt.rule import ScanStep
from inplace_ttt.ttt.transport import Transport
from inplace_ttt.ttt.transport.p2p import P2PTransport
from inplace_ttt.ttt.transport.symmetric_memory import symmetric_memory_transport
from inplace_ttt.ttt.window import Window, WindowPool

# Row blocks start at multiples of the first of these that allows as many blocks as wanted: the height of a kernel's
# tile; half of it; 16 bytes of bf16, which the kernel's loads need
ROW_UNITS = (128, 64, 8, 1)
# Elements of the state that a GPU scans at a time: one tile on each SM, of which Hopper has 132
STATE_PER_WAVE = 128 * (128 * 256)


def row_blocks(d: int, count: int) -> list[slice]:
    """Split the d rows of the state into ``count`` blocks, or fewer where there are not so many."""
    return row_edges(d, count, ROW_UNITS)


def group_blocks(blocks: list[slice], most: int) -> list[range]:
    """Group neighbouring blocks into as few groups of at most ``most`` rows as possible, of equal size or one less.

    Return their numbers; no group where one block has more rows than that.
    """
    for count in range(1, len(blocks) + 1):
        edges = [-(-len(blocks) * group // count) for group in range(count + 1)]
        groups = [range(low, high) for low, high in itertools.pairwise(edges)]
        if all(blocks[group[-1]].stop - blocks[group[0]].start <= most for group in groups):
            return groups
    return []


class Carries(Protocol):
    """The states that stages start from and end with, (b, d, f), in blocks of rows.

    ``open`` a stage before its first ``incoming_block``; for each batch row and each block, in this order,
    ``incoming_block`` where a document comes in, ``outgoing_block`` and ``send`` where one goes on; then ``finish``.
    """

    blocks: list[slice]  # of the rows
    incoming: dict[int, Tensor]  # by stage
    outgoing: dict[int, Tensor]  # by stage

    def open(self, stage: int) -> None: ...

    def incoming_block(self, stage: int, batch: int, block: int) -> Tensor: ...

    def outgoing_block(self, stage: int, batch: int, block: int) -> Tensor | None: ...

    def send(self, stage: int, batch: int, block: int) -> None: ...

    def flush(self) -> None: ...

    def finish(self) -> None: ...


class RingCarries:
    """Carries that are exchanged with neighbouring ranks, and with the caller at the ends of the sequence."""

    def __init__(
        self,
        stages: tuple[ScanStage, ...],
        blocks: list[slice],
        shape: tuple[int, int, int],  # (b, d, f)
        *,
        transport: Transport | None,  # None: there is one rank
        dtype: torch.dtype,
        device: torch.device,
        initial: Tensor | None = None,  # (b, d, f), the caller's
    ):
        self.stages, self.blocks, self.shape, self.transport, self.initial = stages, blocks, shape, transport, initial
        self.dtype, self.device = dtype, device
        self.incoming: dict[int, Tensor] = {}
        self.outgoing: dict[int, Tensor] = {}

    def open(self, stage: int) -> None:
        """Post the receives of a stage, and allocate what it sends."""
        source, target = self.stages[stage].source, self.stages[stage].target
        if target is not None:
            self.outgoing[stage] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if source == CALLER:
            self.incoming[stage] = self.initial
        elif source is not None:
            self.incoming[stage] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            parts = (rows[block] for rows in self.incoming[stage] for block in self.blocks)
            for number, part in enumerate(parts):
                self.transport.post_recv(source, number, part)

    def incoming_block(self, stage: int, batch: int, block: int) -> Tensor:
        """Return (rows, f), the state that the stage's first document starts from, once it is there."""
        source = self.stages[stage].source
        if source != CALLER:
            self.transport.wait_recv(source, batch * len(self.blocks) + block)
        return self.incoming[stage][batch, self.blocks[block]]

    def outgoing_block(self, stage: int, batch: int, block: int) -> Tensor:
        """Return (rows, f), where the state behind the stage is to be written."""
        return self.outgoing[stage][batch, self.blocks[block]]

    def send(self, stage: int, batch: int, block: int) -> None:
        """Send what was written to the outgoing block."""
        target = self.stages[stage].target
        if target != CALLER:
            number = batch * len(self.blocks) + block
            self.transport.send(target, number, self.outgoing_block(stage, batch, block))

    def flush(self) -> None:
        """Make the device send before it goes on."""
        if self.transport is not None:
            self.transport.flush()

    def finish(self) -> None:
        """Make everything that is launched next come after what was sent."""
        if self.transport is not None:
            self.transport.wait_sends()


class SavedCarries:
    """The incoming carries of a forward that was run before; nothing is exchanged."""

    def __init__(self, incoming: dict[int, Tensor], d: int):
        self.incoming, self.blocks = incoming, [slice(0, d)]
        self.outgoing: dict[int, Tensor] = {}

    def open(self, stage: int) -> None: ...

    def incoming_block(self, stage: int, batch: int, block: int) -> Tensor:
        return self.incoming[stage][batch, self.blocks[block]]

    def outgoing_block(self, stage: int, batch: int, block: int) -> None: ...

    def send(self, stage: int, batch: int, block: int) -> None: ...

    def flush(self) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class Exchange:
    """Exchange carries between the ranks of a group."""

    group: dist.ProcessGroup | None  # None: there is one rank
    comm_dtype: torch.dtype
    symmetric_memory: bool = True  # where the ranks can map each other's memory

    def carries(
        self, stages: tuple[ScanStage, ...], shape: tuple[int, int, int], like: Tensor, initial: Tensor | None
    ) -> Carries:
        """Return the carries of a scan over stages; shape is (b, d, f)."""
        b, d, f = shape
        blocks, transport = [slice(0, d)], None
        if self.group is not None:
            blocks, transport = self.blocks_and_transport(b, d, f, like.device)
        return RingCarries(
            stages,
            blocks,
            shape,
            transport=transport,
            dtype=state_dtype(like.dtype),
            device=like.device,
            initial=initial,
        )

    def blocks_and_transport(self, b: int, d: int, f: int, device: torch.device) -> tuple[list[slice], Transport]:
        """Return the row blocks that travel, and the transport.

        More blocks shorten the wait for the first one, which every rank on the way adds to, as long as each of them
        fills the GPU. Two are scanned side by side, so there are at least two. NCCL point-to-point kernels take SMs
        from the products, and smaller messages cost more; copy engines do not.
        """
        two_ranks = self.group.size() == 2
        full = d * f // (STATE_PER_WAVE if two_ranks else STATE_PER_WAVE // 2)
        blocks = row_blocks(d, min(4 if two_ranks else 8, max(full, 2)))
        numels = tuple(f * (rows.stop - rows.start) for rows in blocks) * b
        transport = None
        if self.symmetric_memory:
            transport = symmetric_memory_transport(self.group, numels, self.comm_dtype, device)
        if transport is not None:
            return blocks, transport
        return row_blocks(d, 2 if two_ranks else 4), P2PTransport(self.group, self.comm_dtype)


@lru_cache
def _streams(current: torch.cuda.Stream) -> tuple[torch.cuda.Stream, ...]:
    """Return two streams for each stream that scans are called from: it may still read memory that a scan has returned
    to their allocator, and only what is called from it waits for them."""
    return torch.cuda.Stream(current.device), torch.cuda.Stream(current.device)


class SideStreams:
    """Two streams for the scans of neighbouring blocks, so that block k+1's first CTAs overlap block k's tail wave.

    Without a GPU everything runs where it is called.
    """

    def __init__(self, device: torch.device):
        self.streams: tuple[torch.cuda.Stream, ...] = ()
        if device.type == "cuda":
            current = torch.cuda.current_stream(device)
            self.streams = _streams(current)
            # one after the other: otherwise the second block's CTAs may run before the first one's, which the next
            # rank waits for
            for before, stream in itertools.pairwise((current, *self.streams)):
                stream.wait_stream(before)

    def of(self, block: int):
        """Return the context in which a block is scanned: always the same for the same block."""
        return torch.cuda.stream(self.streams[block % len(self.streams)]) if self.streams else contextlib.nullcontext()

    def join(self) -> None:
        """Make everything that is launched next come after the side streams."""
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)


class Scan:
    """One scan, prefix or suffix, over the documents that cross the edges of a rank's stages.

    ``open`` the stages in order and take the windows of each, by ``windows`` or ``held_windows``; then ``finish``.
    """

    def __init__(
        self,
        stages: tuple[ScanStage, ...],
        base: Tensor | None,  # (d, f); None: zero
        a: Tensor,  # (s, b, d), what is written
        z: Tensor,  # (s, b, f)
        step: ScanStep,
        carries: Carries,
        backend: Backend,
        pool: WindowPool,
        *,
        total: Tensor | None = None,  # (d, f), to which the states at the ends of documents are added
        with_norms: bool = False,  # note the squared norms of the same states
        max_window_bytes: int | None = None,  # None: the backend's choice
    ):
        self.stages, self.base, self.a, self.z, self.step = stages, base, a, z, step
        self.carries, self.backend, self.pool, self.total = carries, backend, pool, total
        self.max_window_bytes = max_window_bytes
        # the segments with which documents end, by (stage, place in it), numbered
        ends = [
            (number, place)
            for number, stage in enumerate(stages)
            for place, segment in enumerate(stage.segments)
            if not segment.sends
        ]
        self._ends = {key: number for number, key in enumerate(ends)}
        # (blocks, b, documents that end): squared norms
        self.norms = None
        if with_norms:
            shape = len(carries.blocks), a.shape[1], len(ends)
            self.norms = torch.empty(shape, dtype=state_dtype(z.dtype), device=z.device)
        self._groups = self._group_blocks()

    def open(self, stage: int) -> None:
        """Prepare to receive the carry of a stage."""
        self.carries.open(stage)

    @property
    def scans_at_once(self) -> bool:
        """Tell whether all blocks of a stage are scanned before any of its windows is used."""
        return len(self._groups) == 1

    def windows(self, stage: int) -> Iterator[tuple[int, slice, Window]]:
        """Scan a stage, and yield (batch row, rows of the state, chunks with their weights) as they are ready: weights
        are valid until the next window."""
        for batch in range(self.a.shape[1]):
            for blocks in self._groups:
                self.pool.release()
                yield from self._scan_group(stage, batch, blocks)
            if not self._groups:
                for block in range(len(self.carries.blocks)):
                    yield from self._scan_block(stage, batch, block)
                self.carries.flush()

    def held_windows(self, stage: int) -> list[tuple[int, slice, Window]]:
        """Scan a stage that ``scans_at_once``, and return its windows: weights are valid until the pool is released."""
        (blocks,) = self._groups
        return [window for batch in range(self.a.shape[1]) for window in self._scan_group(stage, batch, blocks)]

    def finish(self) -> None:
        """Wait for the sends."""
        self.carries.finish()

    def _group_blocks(self) -> list[range]:
        """Group blocks whose weights, of all chunks of the scan, fit in a window; no group where one block's do not.

        The same for all stages, and on ranks with like documents and memory: a rank that waits for more blocks than the
        rank before it sends at a time waits for products of that rank.
        """
        chunks = sum(len(segment.chunks) for stage in self.stages for segment in stage.segments)
        if chunks == 0 or len(self.carries.blocks) == 1:
            return []
        limit = self.backend.exchange_window_bytes if self.max_window_bytes is None else self.max_window_bytes
        return group_blocks(self.carries.blocks, limit // (self.z.element_size() * self.z.shape[2] * chunks))

    def _scan_group(self, stage: int, batch: int, blocks: range) -> Iterator[tuple[int, slice, Window]]:
        """Scan some blocks, then yield the weights of all of them, segment by segment."""
        all_blocks = self.carries.blocks
        rows = slice(all_blocks[blocks[0]].start, all_blocks[blocks[-1]].stop)
        segments = self.stages[stage].segments
        height, f = rows.stop - rows.start, self.z.shape[2]
        weights = [self.pool.take((len(segment.chunks), height, f), self.z) for segment in segments]
        streams = SideStreams(self.z.device)
        for block in blocks:
            here = slice(all_blocks[block].start - rows.start, all_blocks[block].stop - rows.start)
            with streams.of(block):
                for _ in self._scan_block(stage, batch, block, [memory[:, here] for memory in weights]):
                    pass  # its windows are parts of those below
        streams.join()
        self.carries.flush()
        for segment, memory in zip(segments, weights, strict=True):
            chunks = segment.reading_chunks(from_zero=self.base is None)
            yield batch, rows, Window(chunks, memory[: len(chunks)])

    def _scan_block(
        self, stage: int, batch: int, block: int, out: list[Tensor] | None = None
    ) -> Iterator[tuple[int, slice, Window]]:
        """Scan the rows of one block: carry in, windows (into ``out``, by segment, if given), carry out."""
        rows = self.carries.blocks[block]
        # segments that another rank waits for come first
        for place, segment in sorted(enumerate(self.stages[stage].segments), key=lambda item: not item[1].sends):
            norms = None
            if self.norms is not None and not segment.sends:
                norms = self.norms[block, batch, self._ends[stage, place]].unsqueeze(0)
            windows = self.backend.scan(
                [segment],
                None if self.base is None else self.base[rows],
                self.a[:, batch, rows],
                self.z[:, batch],
                self.step,
                self.pool,
                carry_in=self.carries.incoming_block(stage, batch, block) if segment.receives else None,
                carry_out=self.carries.outgoing_block(stage, batch, block) if segment.sends else None,
                total=None if self.total is None else self.total[rows],
                norms=norms,
                max_window_bytes=self.max_window_bytes,
                out=None if out is None else out[place],
            )
            for window in windows:
                yield batch, rows, window
            if segment.sends:
                self.carries.send(stage, batch, block)
