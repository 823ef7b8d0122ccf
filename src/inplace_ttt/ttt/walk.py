"""One way through the slices that a rank holds: sums come in and go out, chunk weights are handed to whoever uses them.

The rows of the state are independent of each other. They are swept in blocks, so that the sum of one block is on its
way to the next rank while the next block is swept; the chunk weights of all blocks of a slice are then used together,
where memory has room for them, for products are the faster the larger they are.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt import chunked
from inplace_ttt.ttt.chunked import Window, state_dtype
from inplace_ttt.ttt.plan import Segment, Stop
from inplace_ttt.ttt.prefix import PrefixRing

# Row blocks start at multiples of this where they are large enough: the height of a kernel's tile
ROW_MULTIPLE = 128


def row_blocks(d: int, cp_size: int) -> list[slice]:
    """The rows of the state in blocks: one where nothing is exchanged.

    More blocks shorten the wait for the first, which every rank on the way adds to; fewer keep the products large.
    """
    count = min({1: 1, 2: 2}.get(cp_size, 4), d)
    unit = ROW_MULTIPLE if d >= count * ROW_MULTIPLE else 1
    edges = [round(d * part / count / unit) * unit for part in range(count)] + [d]
    return [slice(low, high) for low, high in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Exchange:
    """How sums travel: along which group (None: nowhere), in which dtype."""

    group: dist.ProcessGroup | None
    comm_dtype: torch.dtype

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()


# what a segment's sums ended as: (stop, segment's place in it, batch, rows, total, carry)
Finished = Callable[[int, int, int, slice, Tensor, Tensor | None], None]


@dataclass
class Walk:
    """A sweep over all of a rank's tokens, batch row by batch row.

    ``windows`` is walked once. Every rank walks its stops, batch rows, blocks and segments in the same order.
    """

    stops: tuple[Stop, ...]
    base: Tensor | None  # (d, f), None: zero
    a: Tensor  # (s, b, d), what is written
    z: Tensor  # (s, b, f), where it is written
    scale: float
    exchange: Exchange
    sweep: Callable  # chunked.sweep or the kernels'
    room: int | None = None  # bytes that chunk weights may take at a time; None: the kernels' own choice
    meanwhile: Callable[[int], None] | None = None  # called at each stop once its carries are on their way
    known: Iterable[Tensor] | None = None  # the carries, where an earlier walk received them: nothing is exchanged
    carries: list[Tensor] = field(default_factory=list)  # what came in, in the order of the walk

    def windows(self, finished: Finished | None = None) -> Iterator[tuple[int, slice, Window]]:
        """(batch row, rows of the state, chunks with the weights they see); weights are valid until the next step."""
        blocks = row_blocks(self.a.shape[2], self.exchange.size)
        known = None if self.known is None else iter(self.known)
        ring = self._ring(blocks) if known is None else None
        for leg in self._legs():
            for number in leg:
                if ring:
                    ring.open(number)
                if self.meanwhile:
                    self.meanwhile(number)
            for batch in range(self.a.shape[1]):
                together = self._together(leg) if len(blocks) > 1 else {}
                for block, rows in enumerate(blocks):
                    for number in leg:
                        for place, segment in self._what_others_wait_for_first(number):
                            index, carry, total = batch * len(blocks) + block, None, None
                            if segment.receives:
                                carry = ring.get(number, index) if ring else next(known)
                                self.carries.append(carry)
                            if finished or (ring and segment.sends):
                                total = self._empty_sum(rows)
                            yield from self._segment(segment, batch, rows, carry, total, together.get((number, place)))
                            if ring and segment.sends:
                                ring.put(number, index, total)
                            if finished:
                                finished(number, place, batch, rows, total, carry)
                if ring:
                    ring.let_go()
                for (number, place), weights in together.items():
                    chunks = self._with_weights(self.stops[number].segments[place])
                    yield batch, slice(0, self.a.shape[2]), (chunks, weights[: len(chunks)])
        if ring:
            ring.finish()

    def _legs(self) -> list[tuple[int, ...]]:
        """The stops in the order of the walk. At the turn, where this rank hands the sums to itself, it makes both of
        its stops block by block, for the next rank waits for the second."""
        numbers = range(len(self.stops))
        group = self.exchange.group
        if group is not None and self.stops[0].target == group.rank():
            return [tuple(numbers)]
        return [(number,) for number in numbers]

    def _what_others_wait_for_first(self, number: int) -> list[tuple[int, Segment]]:
        return sorted(enumerate(self.stops[number].segments), key=lambda item: not item[1].sends)

    def _ring(self, blocks: list[slice]) -> PrefixRing:
        shapes = [(rows.stop - rows.start, self.z.shape[2]) for rows in blocks] * self.a.shape[1]
        return PrefixRing(
            self.stops,
            shapes,
            group=self.exchange.group,
            dtype=state_dtype(self.z.dtype),
            comm_dtype=self.exchange.comm_dtype,
            device=self.z.device,
        )

    def _empty_sum(self, rows: slice) -> Tensor:
        shape = rows.stop - rows.start, self.z.shape[2]
        return torch.empty(shape, dtype=state_dtype(self.z.dtype), device=self.z.device)

    def _segment(self, segment: Segment, batch: int, rows: slice, carry, total, together: Tensor | None):
        """Sweep one segment; windows that are to be used together are not handed out yet."""
        options = dict(total=total, room=self.room)
        if together is not None:
            options["out"] = together[:, rows]
        windows = self.sweep(
            segment,
            None if self.base is None else self.base[rows],
            carry,
            self.a[:, batch, rows],
            self.z[:, batch],
            self.scale,
            **options,
        )
        for window in windows:
            if together is None:
                yield batch, rows, window
            del window  # its memory is the next one's

    def _together(self, leg: tuple[int, ...]) -> dict[tuple[int, int], Tensor]:
        """By stop and segment, room for the weights of all its chunks and rows; nothing where they do not fit."""
        if self.sweep is chunked.sweep:
            return {}
        from inplace_ttt.ttt.kernels.chunk_weights import WINDOW_BYTES, takes

        d, f = self.a.shape[2], self.z.shape[2]
        counts = {
            (number, place): len(segment.chunks)
            for number in leg
            for place, segment in enumerate(self.stops[number].segments)
            if takes(segment)
        }
        if 2 * d * f * sum(counts.values()) > (WINDOW_BYTES if self.room is None else self.room):
            return {}
        return {
            key: torch.empty(count, d, f, dtype=self.z.dtype, device=self.z.device) for key, count in counts.items()
        }

    def _with_weights(self, segment: Segment) -> tuple[tuple[int, int], ...]:
        """The chunks of a segment that see anything, in the order of their tokens."""
        first_sees_nothing = self.base is None and not segment.receives
        return tuple(sorted(segment.chunks[1:] if first_sees_nothing else segment.chunks))
