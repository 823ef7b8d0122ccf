"""Which tokens form which chunk, and which chunk state crosses which slice edge: plain integers, on the host.

Under context parallelism of size n a sequence is cut into 2n slices of equal length; rank r holds slices r and
2n-1-r (Megatron's load-balanced zigzag), one after the other. A *sweep* walks over the slices in one direction
and carries a running sum of chunk states along every document: the prefix sweep in reading order (the updates a
token sees), the suffix sweep against it (their gradients). Reversed, the zigzag assigns every slice to the same
rank, so both are one algorithm on mirrored indices. The last rank's slices follow on each other: it sweeps them as
one, which is one *stop* of the sweep where other ranks have two.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

Span = tuple[int, int]  # first token, one past the last


class LayoutError(ValueError):
    """A sequence, its documents and the chunk size do not fit together; the message says what would."""


@dataclass(frozen=True)
class Segment:
    """The part of one document that lies in one stop."""

    chunks: tuple[Span, ...]  # in the rank's local sequence, in the order of the sweep
    receives: bool = False  # the sweep comes to this document's tokens in an earlier stop first
    sends: bool = False  # the sweep goes on with this document in a later stop

    @property
    def crosses(self) -> bool:
        """The document goes over an edge of the stop."""
        return self.receives or self.sends

    def reversed(self) -> "Segment":
        """The same on a sweep in the other direction."""
        return Segment(self.chunks[::-1], receives=self.sends, sends=self.receives)


@dataclass(frozen=True)
class Stop:
    """What a sweep comes to on one rank before it goes on to another: a slice, or the two of the last rank."""

    segments: tuple[Segment, ...]  # those that cross its edges, in the order of the sweep: two at most
    source: int | None  # context-parallel rank whose running sum this stop starts from
    target: int | None  # context-parallel rank that goes on from this stop


@dataclass(frozen=True)
class Plan:
    """All that a rank needs to know about its share of a sequence."""

    prefix: tuple[Stop, ...]  # this rank's in reading order
    suffix: tuple[Stop, ...]  # the same in the opposite order
    inner: tuple[Segment, ...]  # documents of several chunks that lie in one stop, in reading order
    alone: tuple[Span, ...]  # documents of one chunk, of which no token sees what they write
    chunk_lengths: tuple[int, ...]  # of all local chunks in the order of their tokens

    @property
    def sweep_chunks(self) -> int:
        """How many chunks a sweep comes by."""
        return len(self.chunk_lengths) - len(self.alone)

    @cached_property
    def inner_reversed(self) -> tuple[Segment, ...]:
        """``inner`` on the suffix sweep."""
        return tuple(segment.reversed() for segment in reversed(self.inner))


def make_plan(
    seq_length: int, chunk_size: int, documents: tuple[int, ...] | None = None, cp_size: int = 1, cp_rank: int = 0
) -> Plan:
    """Cut a sequence of ``seq_length`` tokens (of all ranks) into slices, documents and chunks.

    ``documents`` are the bounds of the documents, from 0 to ``seq_length`` (None: one document).
    Raises LayoutError where no exact plan exists.
    """
    if chunk_size < 1:
        raise LayoutError(f"chunk_size={chunk_size}: a chunk has at least one token")
    if seq_length < 1:
        raise LayoutError(f"a sequence of {seq_length} tokens: there must be at least one")
    bounds = check_documents(documents, seq_length)
    # an empty document holds no tokens: it changes nothing
    return _make_plan(seq_length, chunk_size, tuple(sorted(set(bounds))), cp_size, cp_rank)


def check_documents(documents: tuple[int, ...] | None, seq_length: int) -> tuple[int, ...]:
    """The documents' bounds, checked: from 0 to ``seq_length``, never falling."""
    if documents is None:
        return (0, seq_length)
    if len(documents) < 2 or documents[0] != 0 or documents[-1] != seq_length:
        edges = f"{documents[0]} to {documents[-1]}" if documents else "nothing"
        raise LayoutError(
            f"cu_seqlens spans {edges}: it must start at 0 and end at the length of the whole sequence, {seq_length}"
        )
    for left, right in itertools.pairwise(documents):
        if right < left:
            raise LayoutError(f"cu_seqlens falls from {left} to {right}: document starts must be in order")
    return documents


def slice_bounds(seq_length: int, cp_size: int) -> list[int]:
    """Edges of the slices of the zigzag in reading order; one slice where nothing is split."""
    if cp_size == 1:
        return [0, seq_length]
    if seq_length % (2 * cp_size):
        raise LayoutError(
            f"a sequence of {seq_length} tokens cannot be cut into 2 x context_parallel_size = {2 * cp_size} equal "
            f"slices; use a multiple of {2 * cp_size}"
        )
    length = seq_length // (2 * cp_size)
    return [i * length for i in range(2 * cp_size + 1)]


def local_slices(cp_size: int, cp_rank: int) -> list[int]:
    """The slices that a rank holds, in the order it holds them."""
    return [0] if cp_size == 1 else [cp_rank, 2 * cp_size - 1 - cp_rank]


def owner(index: int, cp_size: int) -> int:
    """The context-parallel rank that holds a slice."""
    return index if index < cp_size else 2 * cp_size - 1 - index


def runs(spans: tuple[Span, ...]) -> list[Span]:
    """Spans, in the order of their tokens, with those that follow on each other as one."""
    found: list[Span] = []
    for start, stop in spans:
        first = found.pop()[0] if found and found[-1][1] == start else start
        found.append((first, stop))
    return found


def evenly_spaced(spans: tuple[Span, ...]) -> Iterator[tuple[Span, ...]]:
    """Spans in as few parts as there can be, in each of which all are equally long and equally far from the next."""
    first = 0
    while first < len(spans):
        start, stop = spans[first]
        last = first + 1
        distance = spans[last][0] - start if last < len(spans) else 0
        while last < len(spans) and spans[last] == (start + distance, stop + distance):
            start, stop = spans[last]
            last += 1
        yield spans[first:last]
        first = last


def document_parts(bounds: tuple[int, ...], first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each document with tokens in [first, last): its own start and end, and those of its part that lies there."""
    for start, end in itertools.pairwise(bounds):
        left, right = max(start, first), min(end, last)
        if left < right:
            yield start, end, left, right


@lru_cache(maxsize=256)
def _make_plan(seq_length: int, chunk_size: int, bounds: tuple[int, ...], cp_size: int, cp_rank: int) -> Plan:
    edges = slice_bounds(seq_length, cp_size)
    if cp_size > 1:
        _check_alignment(edges, bounds, chunk_size)
    prefix, inner, alone, lengths, offset = [], [], [], [], 0
    for first, last in runs(tuple((edges[index], edges[index + 1]) for index in local_slices(cp_size, cp_rank))):
        segments = []
        for start, end, left, right in document_parts(bounds, first, last):
            chunks = []
            for begin in range(left, right, chunk_size):
                stop = min(begin + chunk_size, right)
                chunks.append((begin - first + offset, stop - first + offset))
                lengths.append(stop - begin)
            segments.append(Segment(tuple(chunks), receives=start < first, sends=end > last))
        for segment in segments:
            if not segment.crosses:
                inner.append(segment) if len(segment.chunks) > 1 else alone.append(segment.chunks[0])
        prefix.append(
            Stop(
                tuple(segment for segment in segments if segment.crosses),
                source=owner(edges.index(first) - 1, cp_size) if segments[0].receives else None,
                target=owner(edges.index(last), cp_size) if segments[-1].sends else None,
            )
        )
        offset += last - first
    suffix = tuple(_reverse(stop) for stop in reversed(prefix))
    return Plan(tuple(prefix), suffix, tuple(inner), tuple(alone), tuple(lengths))


def _reverse(stop: Stop) -> Stop:
    segments = tuple(segment.reversed() for segment in reversed(stop.segments))
    return Stop(segments, source=stop.target, target=stop.source)


def _check_alignment(edges: list[int], bounds: tuple[int, ...], chunk_size: int) -> None:
    """No chunk may straddle two slices: the state that is passed on holds whole chunks."""
    starts = set(bounds)
    document = 0
    for index, edge in enumerate(edges[1:-1], start=1):
        while bounds[document + 1] <= edge:
            document += 1
        start = bounds[document]
        if edge not in starts and (edge - start) % chunk_size:
            raise LayoutError(
                f"slice {index} of {len(edges) - 1} starts at token {edge}, inside a chunk of the document that starts "
                f"at token {start} (chunk_size={chunk_size}): under context parallelism slices must start on chunk "
                f"boundaries; use documents that start at multiples of chunk_size and a sequence length that is a "
                f"multiple of {len(edges) - 1} x chunk_size = {(len(edges) - 1) * chunk_size}"
            )
