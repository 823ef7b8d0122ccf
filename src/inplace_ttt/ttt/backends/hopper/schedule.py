"""Make the tables that describe a scan over documents to the kernel.

Documents have any number of chunks and end at any token, and one launch scans as many documents of a batch row as
memory permits. Therefore the kernel reads from tables what each chunk does and where each step's tokens are.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from inplace_ttt.ttt.plan import Segment, Span

# Columns of a chunk's row: number of whole steps to add to the state, remaining tokens (one more step), 1 if the chunk
# uses a weight, and the index of the document that ends with the chunk
WHOLE, LEFT, READS, ENDS, COLUMNS = range(5)
# Instead of a document index: the document continues with the next chunk; the state leaves the stage as a carry
CONTINUES, CARRIED_OUT = -1, -2


@dataclass(frozen=True)
class Schedule:
    """Describe the chunks of a scan. Each chunk uses the state before it updates it."""

    chunks: tuple[Span, ...]  # in the order of the scan
    table: Tensor  # (chunks, COLUMNS) int32, on the device
    tokens: Tensor  # (steps,) int32, on the device: first token of each step
    readers: tuple[int, ...]  # by chunk: number of earlier chunks that use a weight; last element: the total
    steps: tuple[int, ...]  # by chunk: number of earlier steps; last element: the total
    continues: tuple[bool, ...]  # by chunk: True if the document continues with the next chunk
    documents: int  # number of documents that end in the scan
    steps_per_chunk: int  # whole steps of the longest chunk

    @property
    def reverse(self) -> bool:
        """Return True if the scan runs from the last chunk to the first."""
        return len(self.chunks) > 1 and self.chunks[1] < self.chunks[0]

    def windows(self, most: int) -> Iterator[range]:
        """Split the chunk indices into windows with at most ``most`` chunks that use a weight."""
        first = 0
        while first < len(self.chunks):
            last = first + 1
            while last < len(self.chunks) and self.readers[last + 1] - self.readers[first] <= most:
                last += 1
            yield range(first, last)
            first = last

    def reading_chunks(self, window: range) -> tuple[Span, ...]:
        """Return the chunks of a window that use a weight, in token order."""
        reads = (number for number in window if self.readers[number + 1] > self.readers[number])
        return tuple(sorted(self.chunks[number] for number in reads))


@lru_cache(maxsize=64)
def make_schedule(
    segments: tuple[Segment, ...],
    step: int,
    *,
    has_base: bool,
    has_carry: bool,
    carry_out_wanted: bool,
    totals_wanted: bool,
    stream: torch.cuda.Stream | None,
) -> Schedule:
    """Return the schedule of a scan over segments (see ``Backend.scan``) in steps of ``step`` tokens.

    Args:
        has_base: there is a base weight, so every chunk uses a weight, even if the state is zero.
        has_carry: the first segment starts from a carry.
        carry_out_wanted: compute the state after the last segment.
        totals_wanted: compute the states at document ends.
        stream: the current stream, which must be the only one that reads the tables. None: no GPU.
    """
    rows: list = []
    tokens: list = []
    documents = 0
    for place, segment in enumerate(segments):
        for number, (start, stop) in enumerate(segment.chunks):
            is_last = number == len(segment.chunks) - 1
            length = stop - start
            if is_last and not (segment.last_writes and (carry_out_wanted if segment.sends else totals_wanted)):
                length = 0
            reads = has_base or number > 0 or (place == 0 and has_carry)
            reads &= number > 0 or segment.first_reads
            ends = CONTINUES
            if is_last:
                ends = CARRIED_OUT if segment.sends else documents
            rows.append((length // step, length % step, reads, ends))
            tokens += range(start, start + length, step)
        documents += not segment.sends
    return Schedule(
        chunks=tuple(chunk for segment in segments for chunk in segment.chunks),
        table=_on_device(rows, stream),
        tokens=_on_device(tokens or [0], stream),  # not empty, so that it has an address
        readers=tuple(itertools.accumulate((row[READS] for row in rows), initial=0)),
        steps=tuple(itertools.accumulate((row[WHOLE] + (row[LEFT] > 0) for row in rows), initial=0)),
        continues=tuple(row[ENDS] == CONTINUES for row in rows),
        documents=documents,
        steps_per_chunk=max(row[WHOLE] for row in rows),
    )


def _on_device(numbers: list, stream: torch.cuda.Stream | None) -> Tensor:
    table = torch.tensor(numbers, dtype=torch.int32)
    # pinned, so that the host does not wait for the device
    return table if stream is None else table.pin_memory().to(stream.device, non_blocking=True)
