"""One way through the stops that a rank has on a sweep, by the documents that cross their edges: sums come in and go
out, chunk weights are handed to whoever uses them.

The rows of the state are independent of each other. They are swept in blocks, so that the sum of one block is on its
way to the next rank while the next block is swept; the chunk weights of as many blocks as memory has room for are then
used together, for products are the faster the larger they are.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt import chunked
from inplace_ttt.ttt.chunked import Window, state_dtype
from inplace_ttt.ttt.mailbox import mailbox
from inplace_ttt.ttt.plan import Segment, Stop
from inplace_ttt.ttt.prefix import Messages, PrefixRing, Replay, Wire

# Row blocks start at multiples of this where they are large enough: the height of a kernel's tile. Else at multiples
# of 8, 16 bytes of bf16, which the kernel's loads need.
ROW_MULTIPLE = 128
# Elements of the state that a GPU sweeps at a time: a kernel's tile on each of its processors, of which Hopper has 132.
AT_A_TIME = 128 * (128 * 256)


def row_blocks(d: int, count: int) -> list[slice]:
    """The rows of the state in ``count`` blocks, or fewer where there are not so many."""
    count = min(count, d)
    unit = next(unit for unit in (ROW_MULTIPLE, ROW_MULTIPLE // 2, 8, 1) if d >= count * unit)
    edges = [round(d * part / count / unit) * unit for part in range(count)] + [d]
    return [slice(low, high) for low, high in itertools.pairwise(edges)]


def in_groups(blocks: list[slice], most: int) -> list[range]:
    """The numbers of the blocks in as few groups of at most ``most`` rows as there can be, with as many blocks in each
    (or one less); no group where one block is more than that."""
    for count in range(1, len(blocks) + 1):
        edges = [-(-len(blocks) * group // count) for group in range(count + 1)]
        groups = [range(low, high) for low, high in itertools.pairwise(edges)]
        if all(blocks[group[-1]].stop - blocks[group[0]].start <= most for group in groups):
            return groups
    return []


@dataclass(frozen=True)
class Exchange:
    """How sums travel: along which group, in which dtype."""

    group: dist.ProcessGroup
    comm_dtype: torch.dtype
    mailboxes: bool = True  # where the ranks can have them

    def blocks_and_wire(self, b: int, d: int, f: int, device: torch.device) -> tuple[list[slice], Wire]:
        """The row blocks that travel, and by what.

        More blocks shorten the wait for the first, which every rank on the way adds to, but not below what one tile
        takes: blocks that do not fill the GPU are only more of them. Two are swept side by side, so two there are at
        least. Messages take processors from the products beside them, and the more the smaller they are; the copy
        engines do not.
        """
        two = self.group.size() == 2
        full = d * f // (AT_A_TIME if two else AT_A_TIME // 2)
        blocks = row_blocks(d, min(4 if two else 8, max(full, 2)))
        numels = tuple(f * (rows.stop - rows.start) for rows in blocks) * b
        wire = mailbox(self.group, numels, self.comm_dtype, device) if self.mailboxes else None
        if wire is not None:
            return blocks, wire
        return row_blocks(d, 2 if two else 4), Messages(self.group, self.comm_dtype)


@lru_cache
def _streams(current: torch.cuda.Stream) -> tuple[torch.cuda.Stream, ...]:
    """A pair for each stream that walks are called from: it may still read what a walk has given back to its lanes, and
    the next walk's lanes wait for it alone."""
    return torch.cuda.Stream(current.device), torch.cuda.Stream(current.device)


class Lanes:
    """Streams for the sweeps of neighbouring blocks: the next one's first programs fill the processors that the last
    programs of one leave idle. Without a GPU everything runs where it is called."""

    def __init__(self, device: torch.device):
        self.streams = ()
        if device.type == "cuda":
            current = torch.cuda.current_stream(device)
            self.streams = _streams(current)
            # one after the other: let loose together, the second block's programs may come before the first one's,
            # which the next rank waits for
            for before, stream in itertools.pairwise((current, *self.streams)):
                stream.wait_stream(before)

    def of(self, block: int):
        """The context in which a block is swept: always the same for the same block."""
        return torch.cuda.stream(self.streams[block % len(self.streams)]) if self.streams else contextlib.nullcontext()

    def join(self) -> None:
        """What is called from now on comes after everything in the lanes."""
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)


@dataclass
class Walk:
    """A sweep over what a rank holds of documents that cross the edges of its stops, batch row by batch row.

    ``windows`` is walked once. What goes from one rank to another goes and is taken out in one order: batch row by
    batch row, block by block.
    """

    stops: tuple[Stop, ...]
    base: Tensor | None  # (d, f), None: zero
    a: Tensor  # (s, b, d), what is written
    z: Tensor  # (s, b, f), where it is written
    scale: float
    exchange: Exchange
    sweep: Callable  # chunked.sweep or the kernels'
    add_to: Tensor | None = None  # (d, f), to which the sums of documents are added where the sweep comes to their end
    with_norms: bool = False  # note the squared norms of the same sums
    room: int | None = None  # bytes that chunk weights may take at a time; None: the kernels' own choice
    meanwhile: Callable[[int], None] | None = None  # called at each stop once its carries are on their way
    # by stop, (b, d, f): what it started from. Given, where an earlier walk received them: nothing is exchanged
    carries: dict[int, Tensor] | None = None
    only: Collection[int] | None = None  # where nothing is exchanged, stops may be left out
    # (blocks, b, documents that the sweep comes to the end of): the squared norms, once walked
    norms: Tensor | None = field(default=None, init=False)

    def windows(self) -> Iterator[tuple[int, int, slice, Window]]:
        """(stop, batch row, rows of the state, chunks with the weights they see), weights valid until the next step."""
        sums = self._sums()
        groups = self._groups(sums.blocks)
        if self.with_norms:
            shape = len(sums.blocks), self.a.shape[1], len(self._ends)
            self.norms = torch.empty(shape, dtype=state_dtype(self.z.dtype), device=self.z.device)
        for stop in range(len(self.stops)) if self.only is None else self.only:
            sums.open(stop)
            if self.meanwhile:
                self.meanwhile(stop)
            for batch in range(self.a.shape[1]):
                for blocks in groups:
                    yield from self._together(sums, stop, batch, blocks)
                if not groups:
                    for block in range(len(sums.blocks)):
                        yield from self._block(sums, stop, batch, block)
                    sums.let_go()
        sums.finish()
        self.carries = sums.came

    @cached_property
    def _ends(self) -> dict[tuple[int, int], int]:
        """The segments with which documents end, by (stop, place in it), numbered."""
        ends = [
            (number, place)
            for number, stop in enumerate(self.stops)
            for place, segment in enumerate(stop.segments)
            if not segment.sends
        ]
        return {key: number for number, key in enumerate(ends)}

    def _sums(self) -> PrefixRing | Replay:
        """What sums come in by and go out by."""
        b, d, f = *self.a.shape[1:], self.z.shape[2]
        if self.carries is not None:
            return Replay(self.carries, [slice(0, d)])
        blocks, wire = self.exchange.blocks_and_wire(b, d, f, self.z.device)
        return PrefixRing(
            self.stops,
            blocks,
            (b, d, f),
            wire=wire,
            dtype=state_dtype(self.z.dtype),
            device=self.z.device,
        )

    def _groups(self, blocks: list[slice]) -> list[range]:
        """The blocks whose weights, of all chunks of the walk, there is room for at a time; none where there is no room
        for one block's, or nothing to be gained. The same for all stops, and on ranks with like documents and memory:
        who waits for more blocks than the rank before it sends at a time waits for products of that rank."""
        if self.sweep is chunked.sweep or self.carries is not None:
            return []
        from inplace_ttt.ttt.kernels.chunk_weights import EXCHANGE_BYTES

        chunks = sum(len(segment.chunks) for stop in self.stops for segment in stop.segments)
        if chunks == 0:
            return []
        bytes_of_row = self.z.element_size() * self.z.shape[2] * chunks
        return in_groups(blocks, (EXCHANGE_BYTES if self.room is None else self.room) // bytes_of_row)

    def _together(self, sums, stop: int, batch: int, blocks: range) -> Iterator:
        """Sweep some blocks and hand out the weights of all of them, segment by segment."""
        rows = slice(sums.blocks[blocks[0]].start, sums.blocks[blocks[-1]].stop)
        segments = self.stops[stop].segments
        weights = [
            self.z.new_empty(len(segment.chunks), rows.stop - rows.start, self.z.shape[2]) for segment in segments
        ]
        lanes = Lanes(self.z.device)
        for block in blocks:
            here = slice(sums.blocks[block].start - rows.start, sums.blocks[block].stop - rows.start)
            with lanes.of(block):
                out = [of_segment[:, here] for of_segment in weights]
                for _ in self._block(sums, stop, batch, block, out):
                    pass  # its windows are parts of those below
        del out
        lanes.join()
        sums.let_go()
        for segment in segments:
            chunks = self._with_weights(segment)
            yield stop, batch, rows, (chunks, weights.pop(0)[: len(chunks)])

    def _block(self, sums, stop: int, batch: int, block: int, out: list | None = None) -> Iterator:
        """Sweep the rows of one block: sums in, windows (into ``out``, by segment, if given), sums out."""
        rows = sums.blocks[block]
        for place, segment in self._what_others_wait_for_first(stop):
            norms = None
            if self.with_norms and not segment.sends:
                norms = self.norms[block, batch, self._ends[stop, place]].unsqueeze(0)
            for window in self.sweep(
                [segment],
                None if self.base is None else self.base[rows],
                sums.get(stop, batch, block) if segment.receives else None,
                self.a[:, batch, rows],
                self.z[:, batch],
                self.scale,
                going=sums.going(stop, batch, block) if segment.sends else None,
                add_to=None if self.add_to is None else self.add_to[rows],
                norms=norms,
                room=self.room,
                **({} if out is None else dict(out=out[place])),
            ):
                yield stop, batch, rows, window
                del window  # its memory is the next one's
            if segment.sends:
                sums.put(stop, batch, block)

    def _what_others_wait_for_first(self, stop: int) -> list[tuple[int, Segment]]:
        return sorted(enumerate(self.stops[stop].segments), key=lambda item: not item[1].sends)

    def _with_weights(self, segment: Segment) -> tuple[tuple[int, int], ...]:
        """The chunks of a segment that see anything, in the order of their tokens."""
        first_sees_nothing = self.base is None and not segment.receives
        return tuple(sorted(segment.chunks[1:] if first_sees_nothing else segment.chunks))
