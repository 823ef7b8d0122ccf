"""Scan a rank's stages: receive a carry, yield chunk weights, send a carry.

The incoming carry of a slice is the sum of the updates of all earlier slices in the same document: an exclusive prefix
sum over slices. The carry passes from rank 0 to rank n-1 (slices 0 .. n-1). Rank n-1 scans slices n-1 and n as one
stage. The carry then returns to rank 0 (slices n .. 2n-1). Ranks exchange a message only if a document crosses the edge
between their slices.

The rows of the state are independent, so they are scanned in blocks: while the carry of one block is sent, the next
block is scanned. The chunk weights of as many blocks as fit in ``max_window_bytes`` are then used in one product,
because large products are more efficient.
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

# Row blocks start at multiples of the largest of these that permits the wanted number of blocks: the height of a
# kernel's tile; half of it; 16 bytes of bf16, the alignment of TMA loads; 1
ROW_UNITS = (128, 64, 8, 1)
# Elements of the state that a GPU scans at a time: about one tile of 128 x 256 on each of Hopper's 132 SMs
STATE_PER_WAVE = 128 * (128 * 256)


def row_blocks(d: int, count: int) -> list[slice]:
    """Split the d rows of the state into at most ``count`` blocks."""
    return row_edges(d, count, ROW_UNITS)


def group_blocks(blocks: list[slice], most: int) -> list[range]:
    """Group adjacent blocks into as few groups of at most ``most`` rows as possible, whose sizes differ by at most one.

    Returns the block indices of each group, or no group if one block has more than ``most`` rows.
    """
    for count in range(1, len(blocks) + 1):
        edges = [-(-len(blocks) * group // count) for group in range(count + 1)]
        groups = [range(low, high) for low, high in itertools.pairwise(edges)]
        if all(blocks[group[-1]].stop - blocks[group[0]].start <= most for group in groups):
            return groups
    return []


class Carries(Protocol):
    """Provide the incoming and outgoing carries (b, d, f) of scan stages, in row blocks.

    Call order: ``open(stage)``; then for each batch row and block ``incoming_block`` (if a document enters the stage),
    ``outgoing_block`` and ``send`` (if a document leaves it); at the end ``finish``.
    """

    blocks: list[slice]  # row blocks of the state
    incoming: dict[int, Tensor]  # (b, d, f) by stage
    outgoing: dict[int, Tensor]  # (b, d, f) by stage

    def open(self, stage: int) -> None:
        """Prepare to receive the carry of a stage."""

    def incoming_block(self, stage: int, batch: int, block: int) -> Tensor:
        """Return the incoming carry (rows, f) of a block, valid on the current stream."""

    def outgoing_block(self, stage: int, batch: int, block: int) -> Tensor | None:
        """Return the buffer (rows, f) for the outgoing carry of a block; None: the carry is not needed."""

    def send(self, stage: int, batch: int, block: int) -> None:
        """Send the outgoing carry of a block."""

    def flush(self) -> None:
        """Make the current stream wait for sends that later kernels would delay."""

    def finish(self) -> None:
        """Make the current stream wait for all sends."""


class RingCarries:
    """Exchange carries with neighbouring ranks, and with the caller at the ends of the sequence."""

    def __init__(
        self,
        stages: tuple[ScanStage, ...],
        blocks: list[slice],
        shape: tuple[int, int, int],  # (b, d, f)
        *,
        transport: Transport | None,  # None: one rank
        dtype: torch.dtype,
        device: torch.device,
        initial: Tensor | None = None,  # (b, d, f), carry from the caller
    ):
        self.stages, self.blocks, self.shape, self.transport, self.initial = stages, blocks, shape, transport, initial
        self.dtype, self.device = dtype, device
        self.incoming: dict[int, Tensor] = {}
        self.outgoing: dict[int, Tensor] = {}

    def open(self, stage: int) -> None:
        """Post the receives of a stage, and allocate its outgoing carry."""
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
        """Wait for a block of the incoming carry on the current stream, and return it, (rows, f)."""
        source = self.stages[stage].source
        if source != CALLER:
            self.transport.wait_recv(source, batch * len(self.blocks) + block)
        return self.incoming[stage][batch, self.blocks[block]]

    def outgoing_block(self, stage: int, batch: int, block: int) -> Tensor:
        """Return the buffer (rows, f) for a block of the outgoing carry."""
        return self.outgoing[stage][batch, self.blocks[block]]

    def send(self, stage: int, batch: int, block: int) -> None:
        """Send a block of the outgoing carry."""
        target = self.stages[stage].target
        if target != CALLER:
            number = batch * len(self.blocks) + block
            self.transport.send(target, number, self.outgoing_block(stage, batch, block))

    def flush(self) -> None:
        """Make the current stream wait for sends that later kernels would delay."""
        if self.transport is not None:
            self.transport.flush()

    def finish(self) -> None:
        """Make the current stream wait for all sends."""
        if self.transport is not None:
            self.transport.wait_sends()


class SavedCarries:
    """Provide the saved incoming carries of an earlier forward, without communication."""

    def __init__(self, incoming: dict[int, Tensor], d: int):
        self.incoming, self.blocks = incoming, [slice(0, d)]
        self.outgoing: dict[int, Tensor] = {}

    def open(self, stage: int) -> None:
        """Do nothing: the incoming carries are already here."""

    def incoming_block(self, stage: int, batch: int, block: int) -> Tensor:
        """Return the saved incoming carry (d, f) of a batch row; there is one block."""
        return self.incoming[stage][batch, self.blocks[block]]

    def outgoing_block(self, stage: int, batch: int, block: int) -> None:
        """Return None: outgoing carries are not needed, since every rank has saved its incoming ones."""

    def send(self, stage: int, batch: int, block: int) -> None:
        """Do nothing: the receiver has saved this carry."""

    def flush(self) -> None:
        """Do nothing: there are no sends to wait for."""

    def finish(self) -> None:
        """Do nothing: there are no sends to wait for."""


@dataclass(frozen=True)
class Exchange:
    """Exchange carries between the ranks of a group."""

    group: dist.ProcessGroup | None  # None: one rank
    comm_dtype: torch.dtype  # dtype of messages
    symmetric_memory: bool = True  # use symmetric memory if the ranks can map each other's memory

    def carries(
        self, stages: tuple[ScanStage, ...], shape: tuple[int, int, int], like: Tensor, initial: Tensor | None
    ) -> Carries:
        """Return the carries of a scan over stages.

        Args:
            shape: (b, d, f).
            like: tensor with the dtype of the operands, on their device.
            initial: (b, d, f), carry from the caller, or None.
        """
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
        """Return the row blocks in which carries are exchanged, and the transport.

        Each hop waits for the scan of the first block, so more blocks shorten the wait as long as each block fills the
        GPU. Two blocks are scanned concurrently, so there are at least two. NCCL point-to-point kernels take SMs from
        the products, and smaller messages cost more, so there are fewer blocks with NCCL. Copy engines take no SMs.
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
    """Return two side streams for each calling stream.

    They are not shared between calling streams: a calling stream may still read memory that a scan has returned to the
    allocator of its side streams, and only the calling stream waits for them.
    """
    return torch.cuda.Stream(current.device), torch.cuda.Stream(current.device)


class SideStreams:
    """Run the scans of adjacent blocks on two streams, so that block k+1's first CTAs overlap block k's tail wave.

    On the CPU there are no side streams.
    """

    def __init__(self, device: torch.device):
        self.streams: tuple[torch.cuda.Stream, ...] = ()
        if device.type == "cuda":
            current = torch.cuda.current_stream(device)
            self.streams = _streams(current)
            # The second stream starts after the first: otherwise the second block's CTAs may run before those of the
            # first block, for which the next rank waits
            for before, stream in itertools.pairwise((current, *self.streams)):
                stream.wait_stream(before)

    def of(self, block: int):
        """Return the stream context of a block; a block always has the same stream."""
        return torch.cuda.stream(self.streams[block % len(self.streams)]) if self.streams else contextlib.nullcontext()

    def join(self) -> None:
        """Make the current stream wait for the side streams."""
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)


class Scan:
    """Run a prefix or suffix scan over the documents that cross the edges of a rank's stages.

    Call order: for each stage ``open``, then ``windows`` or ``held_windows``; at the end ``finish``.
    """

    def __init__(
        self,
        stages: tuple[ScanStage, ...],
        base: Tensor | None,  # (d, f); None: zero
        a: Tensor,  # (s, b, d), targets in the prefix scan, output gradients in the suffix scan
        z: Tensor,  # (s, b, f)
        step: ScanStep,
        carries: Carries,
        backend: Backend,
        pool: WindowPool,
        *,
        total: Tensor | None = None,  # (d, f), receives the sum of the states at document ends
        with_norms: bool = False,  # True: compute the squared norms of the states at document ends
        max_window_bytes: int | None = None,  # None: the backend's choice
    ):
        self.stages, self.base, self.a, self.z, self.step = stages, base, a, z, step
        self.carries, self.backend, self.pool, self.total = carries, backend, pool, total
        self.max_window_bytes = max_window_bytes
        # Segments with which documents end, as (stage, index in the stage)
        ends = [
            (number, place)
            for number, stage in enumerate(stages)
            for place, segment in enumerate(stage.segments)
            if not segment.sends
        ]
        self._ends = {key: number for number, key in enumerate(ends)}
        # (blocks, b, documents that end), squared norms
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
        """Return True if all blocks of a stage are scanned before the first of its windows is used."""
        return len(self._groups) == 1

    def windows(self, stage: int) -> Iterator[tuple[int, slice, Window]]:
        """Scan a stage, and yield (batch row, rows of the state, window). A window is valid until the next one."""
        for batch in range(self.a.shape[1]):
            for blocks in self._groups:
                self.pool.release()
                yield from self._scan_group(stage, batch, blocks)
            if not self._groups:
                for block in range(len(self.carries.blocks)):
                    yield from self._scan_block(stage, batch, block)
                self.carries.flush()

    def held_windows(self, stage: int) -> list[tuple[int, slice, Window]]:
        """Scan a stage and return its windows, valid until the pool is released. Requires ``scans_at_once``."""
        (blocks,) = self._groups
        return [window for batch in range(self.a.shape[1]) for window in self._scan_group(stage, batch, blocks)]

    def finish(self) -> None:
        """Make the current stream wait for all sends."""
        self.carries.finish()

    def _group_blocks(self) -> list[range]:
        """Return groups of blocks whose weights, of all chunks of the scan, fit in a window.

        Returns no group if the weights of one block do not fit. The groups are equal for all stages, and on ranks with
        equal documents and memory: a rank that needs more blocks at a time than the previous rank sends at a time
        would wait for products of that rank.
        """
        chunks = sum(len(segment.chunks) for stage in self.stages for segment in stage.segments)
        if chunks == 0 or len(self.carries.blocks) == 1:
            return []
        limit = self.backend.exchange_window_bytes if self.max_window_bytes is None else self.max_window_bytes
        return group_blocks(self.carries.blocks, limit // (self.z.element_size() * self.z.shape[2] * chunks))

    def _scan_group(self, stage: int, batch: int, blocks: range) -> Iterator[tuple[int, slice, Window]]:
        """Scan a group of blocks, then yield the weights of the group, segment by segment."""
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
                    pass  # these windows are parts of the windows below
        streams.join()
        self.carries.flush()
        for segment, memory in zip(segments, weights, strict=True):
            chunks = segment.reading_chunks(from_zero=self.base is None)
            yield batch, rows, Window(chunks, memory[: len(chunks)])

    def _scan_block(
        self, stage: int, batch: int, block: int, out: list[Tensor] | None = None
    ) -> Iterator[tuple[int, slice, Window]]:
        """Scan one block: receive the carry, yield windows (written to ``out`` by segment, if given), send it."""
        rows = self.carries.blocks[block]
        # segments for which another rank waits come first
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
