"""A sweep over documents, written out as the tables that the kernel goes by.

Documents have any number of chunks and end at any token, and one launch sweeps as many of a batch row as there is room
for: so what a chunk does, and where each step's tokens are, is read from memory.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from inplace_ttt.ttt.plan import Segment, Span

# Columns of a chunk's row: how many whole steps write it, how many tokens are left for one more, whether it sees
# anything, and the number of the document that ends with it
WHOLE, LEFT, SEES, ENDS, COLUMNS = range(5)
# In the place of that number: the next chunk is the same document's; it goes on in another stop
GOES_ON, GOES_ELSEWHERE = -1, -2


@dataclass(frozen=True)
class Schedule:
    """A sweep's chunks, each of which sees what is there before it is written."""

    chunks: tuple[Span, ...]  # in the order of the sweep
    table: Tensor  # (chunks, COLUMNS) int32, on the device
    tokens: Tensor  # (steps,) int32, on the device: the first of each step
    seen: tuple[int, ...]  # by chunk: how many before it see anything; then of all
    steps: tuple[int, ...]  # by chunk: how many before it; then of all
    goes_on: tuple[bool, ...]  # by chunk: whether the next one is the same document's
    documents: int  # that end on the sweep
    steps_a_chunk: int  # whole ones, in the longest

    @property
    def reverse(self) -> bool:
        """From the last chunk to the first."""
        return len(self.chunks) > 1 and self.chunks[1] < self.chunks[0]

    def windows(self, most: int) -> Iterator[range]:
        """The numbers of the chunks in parts of which at most ``most`` see anything."""
        first = 0
        while first < len(self.chunks):
            last = first + 1
            while last < len(self.chunks) and self.seen[last + 1] - self.seen[first] <= most:
                last += 1
            yield range(first, last)
            first = last

    def that_see(self, window: range) -> tuple[Span, ...]:
        """Those chunks of a window that see anything, in the order of their tokens."""
        return tuple(sorted(self.chunks[number] for number in window if self.seen[number + 1] > self.seen[number]))


@lru_cache(maxsize=64)
def make_schedule(
    segments: tuple[Segment, ...],
    step: int,
    *,
    based: bool,
    carried: bool,
    goes_elsewhere: bool,
    to_the_end: bool,
    stream: torch.cuda.Stream | None,
) -> Schedule:
    """Write out the sweep over segments as ``chunked.sweep`` has it, in steps of ``step`` tokens.

    ``based``: all chunks see something. ``carried``: those of the first segment do. ``goes_elsewhere``: what goes on
    from the last segment is wanted. ``to_the_end``: what documents sum up to where they end is. ``stream``: the only
    one that will read the tables, current here (None: there is no GPU).
    """
    rows, tokens, documents = [], [], 0
    for place, segment in enumerate(segments):
        for number, (start, stop) in enumerate(segment.chunks):
            is_last = number == len(segment.chunks) - 1
            length = stop - start
            if is_last and not (goes_elsewhere if segment.sends else to_the_end):
                length = 0
            sees = based or number > 0 or (place == 0 and carried)
            ends = GOES_ON
            if is_last:
                ends = GOES_ELSEWHERE if segment.sends else documents
            rows.append((length // step, length % step, sees, ends))
            tokens += range(start, start + length, step)
        documents += not segment.sends
    return Schedule(
        chunks=tuple(chunk for segment in segments for chunk in segment.chunks),
        table=_on_device(rows, stream),
        tokens=_on_device(tokens or [0], stream),  # something to point at
        seen=tuple(itertools.accumulate((row[SEES] for row in rows), initial=0)),
        steps=tuple(itertools.accumulate((row[WHOLE] + (row[LEFT] > 0) for row in rows), initial=0)),
        goes_on=tuple(row[ENDS] == GOES_ON for row in rows),
        documents=documents,
        steps_a_chunk=max(row[WHOLE] for row in rows),
    )


def _on_device(numbers: list, stream: torch.cuda.Stream | None) -> Tensor:
    table = torch.tensor(numbers, dtype=torch.int32)
    # pinned, so that the host does not wait for the device
    return table if stream is None else table.pin_memory().to(stream.device, non_blocking=True)
