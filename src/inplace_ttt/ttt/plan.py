"""Plan a sequence: slices, documents, chunks, and the states that cross slice edges, as plain integers.

Under context parallelism of size n a sequence is cut into 2n slices of equal length. Rank r holds slices r and 2n-1-r
(Megatron's load-balanced zigzag), concatenated. A *scan* visits the slices in one direction and carries a state along
every document: the prefix scan in token order (the updates that a token sees), the suffix scan in reverse order (the
gradients of the updates). The reversed zigzag assigns every slice to the same rank, so both scans are one algorithm on
mirrored indices. A *scan stage* is the tokens that a rank scans before it sends the carry: one slice, or both slices of
the last rank, which are adjacent.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

Span = tuple[int, int]  # first token, one past the last

# Instead of a rank: the caller provides the carry (initial state), or receives it (final state)
CALLER = -1


class LayoutError(ValueError):
    """Report a sequence, documents and a chunk size that do not fit together. The message says what would work."""


@dataclass(frozen=True)
class Segment:
    """Describe the part of one document inside one scan stage."""

    chunks: tuple[Span, ...]  # token spans in the rank's local sequence, in the order of the scan
    receives: bool = False  # starts from an incoming carry
    sends: bool = False  # ends with an outgoing carry
    first_reads: bool = True  # False: the first chunk does not use the state (an unfinished chunk, on the suffix scan)
    last_writes: bool = True  # False: the last chunk does not change the state (an unfinished chunk)

    @property
    def crosses(self) -> bool:
        """Return True if the document crosses an edge of the stage."""
        return self.receives or self.sends

    def reversed(self) -> "Segment":
        """Return the segment for the scan in the other direction."""
        return Segment(
            self.chunks[::-1],
            receives=self.sends,
            sends=self.receives,
            first_reads=self.last_writes,
            last_writes=self.first_reads,
        )

    def reading_chunks(self, from_zero: bool) -> tuple[Span, ...]:
        """Return the chunks that use the state, in token order.

        ``from_zero``: the scan has no base weight, so chunks whose state is zero are left out.
        """
        skips_first = not self.first_reads or (from_zero and not self.receives)
        return tuple(sorted(self.chunks[1:] if skips_first else self.chunks))


@dataclass(frozen=True)
class ScanStage:
    """Describe contiguous slices that a rank scans before it sends the carry."""

    tokens: Span  # in the rank's local sequence
    segments: tuple[Segment, ...]  # at most two that cross the stage's edges, in the order of the scan
    source: int | None  # context-parallel rank (or CALLER) of the incoming carry
    target: int | None  # context-parallel rank (or CALLER) of the outgoing carry

    def reversed(self) -> "ScanStage":
        """Return the stage for the scan in the other direction."""
        segments = tuple(segment.reversed() for segment in reversed(self.segments))
        return ScanStage(self.tokens, segments, source=self.target, target=self.source)


@dataclass(frozen=True)
class Plan:
    """Describe the slices, documents and chunks of one rank.

    All layers share one plan. It is picklable and holds no process group.
    """

    seq_length: int  # tokens of the whole sequence
    chunk_size: int  # tokens per chunk
    bounds: tuple[int, ...]  # document bounds in the whole sequence, from 0 to seq_length, without empty documents
    cp_size: int
    cp_rank: int
    prefix: tuple[ScanStage, ...]  # stages of the prefix scan, in token order
    inner: tuple[Segment, ...]  # documents of several chunks inside one stage, in token order
    single_chunk_documents: tuple[Span, ...]  # documents of one chunk, which need no scan
    chunk_lengths: tuple[int, ...]  # tokens of each local chunk, in token order

    @property
    def local_length(self) -> int:
        """Return the number of tokens on this rank."""
        return self.seq_length // self.cp_size

    @property
    def scanned_chunks(self) -> int:
        """Return the number of local chunks that a scan visits."""
        return len(self.chunk_lengths) - len(self.single_chunk_documents)

    @cached_property
    def suffix(self) -> tuple[ScanStage, ...]:
        """Return the stages of the suffix scan, in reverse token order."""
        return tuple(stage.reversed() for stage in reversed(self.prefix))

    @cached_property
    def inner_reversed(self) -> tuple[Segment, ...]:
        """Return ``inner`` for the suffix scan."""
        return tuple(segment.reversed() for segment in reversed(self.inner))

    @cached_property
    def chunks(self) -> tuple[Span, ...]:
        """Return all local chunks, in token order."""
        return tuple(itertools.pairwise(itertools.accumulate(self.chunk_lengths, initial=0)))

    @cached_property
    def read_chunks(self) -> tuple[bool, ...]:
        """Return for each local chunk, in token order, True if a later chunk of its document uses its update."""
        read: set[Span] = set()
        for segment in (*(segment for stage in self.prefix for segment in stage.segments), *self.inner):
            ends_here = not segment.sends or not segment.last_writes
            read.update(segment.chunks[:-1] if ends_here else segment.chunks)
        return tuple(chunk in read for chunk in self.chunks)

    def with_state(self, initial: bool, final: bool) -> "Plan":
        """Return the plan with an initial state for the first document, or a final state of the last one.

        Raises LayoutError if the final state has an unfinished chunk under context parallelism.
        """
        return _make_plan(
            self.seq_length, self.chunk_size, self.bounds, self.cp_size, self.cp_rank, initial=initial, final=final
        )


def make_plan(
    seq_length: int, chunk_size: int, documents: tuple[int, ...] | None = None, cp_size: int = 1, cp_rank: int = 0
) -> Plan:
    """Plan a sequence of ``seq_length`` tokens (of all ranks) with chunks of ``chunk_size`` tokens.

    Args:
        documents: document bounds, from 0 to ``seq_length``. None: one document.

    Raises:
        LayoutError: the sequence cannot be cut into equal slices, a slice starts inside a chunk, or the document bounds
            are invalid.
    """
    if chunk_size < 1:
        raise LayoutError(f"chunk_size={chunk_size}: use 1 or more tokens")
    if seq_length < 1:
        raise LayoutError(f"a sequence of {seq_length} tokens: use 1 or more")
    bounds = check_documents(documents, seq_length)
    return _make_plan(seq_length, chunk_size, tuple(sorted(set(bounds))), cp_size, cp_rank)


def check_documents(documents: tuple[int, ...] | None, seq_length: int) -> tuple[int, ...]:
    """Return the document bounds, or (0, seq_length) for None.

    Raises LayoutError if the bounds do not start at 0, do not end at ``seq_length``, or decrease.
    """
    if documents is None:
        return (0, seq_length)
    if len(documents) < 2 or documents[0] != 0 or documents[-1] != seq_length:
        edges = f"{documents[0]} to {documents[-1]}" if documents else "nothing"
        raise LayoutError(
            f"cu_seqlens spans {edges}: it must start at 0 and end at the length of the whole sequence, {seq_length}"
        )
    for left, right in itertools.pairwise(documents):
        if right < left:
            raise LayoutError(f"cu_seqlens decreases from {left} to {right}: use document bounds in ascending order")
    return documents


def slice_bounds(seq_length: int, cp_size: int) -> list[int]:
    """Return the slice edges in token order; for ``cp_size=1`` there is one slice."""
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
    """Return the indices of the slices that a rank holds, in its local order."""
    return [0] if cp_size == 1 else [cp_rank, 2 * cp_size - 1 - cp_rank]


def slice_owner(index: int, cp_size: int) -> int:
    """Return the context-parallel rank that holds a slice."""
    return index if index < cp_size else 2 * cp_size - 1 - index


def merge_adjacent(spans: tuple[Span, ...]) -> list[Span]:
    """Merge adjacent spans; ``spans`` are in token order."""
    merged: list[Span] = []
    for start, stop in spans:
        first = merged.pop()[0] if merged and merged[-1][1] == start else start
        merged.append((first, stop))
    return merged


def evenly_spaced(spans: tuple[Span, ...]) -> Iterator[tuple[Span, ...]]:
    """Split spans into as few groups as possible; all spans of a group have equal length and equal spacing."""
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
    """Yield (start, end, start inside, end inside) of each document with tokens in [first, last)."""
    for start, end in itertools.pairwise(bounds):
        left, right = max(start, first), min(end, last)
        if left < right:
            yield start, end, left, right


@lru_cache(maxsize=256)
def _make_plan(
    seq_length: int,
    chunk_size: int,
    bounds: tuple[int, ...],
    cp_size: int,
    cp_rank: int,
    *,
    initial: bool = False,
    final: bool = False,
) -> Plan:
    edges = slice_bounds(seq_length, cp_size)
    if cp_size > 1:
        _check_alignment(edges, bounds, chunk_size)
    unfinished = final and (seq_length - bounds[-2]) % chunk_size > 0
    if unfinished and cp_size > 1:
        raise LayoutError(
            f"the last document, of {seq_length - bounds[-2]} tokens, ends inside a chunk (chunk_size={chunk_size}): "
            f"under context parallelism a final state exists only at chunk boundaries; end at a multiple of chunk_size"
        )
    prefix, inner, single, lengths, offset = [], [], [], [], 0
    for first, last in merge_adjacent(tuple((edges[i], edges[i + 1]) for i in local_slices(cp_size, cp_rank))):
        segments = []
        for start, end, left, right in document_parts(bounds, first, last):
            chunks = []
            for begin in range(left, right, chunk_size):
                stop = min(begin + chunk_size, right)
                chunks.append((begin - first + offset, stop - first + offset))
                lengths.append(stop - begin)
            from_caller, to_caller = initial and left == 0, final and right == seq_length
            segments.append(
                Segment(
                    tuple(chunks),
                    receives=start < first or from_caller,
                    sends=end > last or to_caller,
                    last_writes=not (unfinished and to_caller),
                )
            )
        for segment in segments:
            if not segment.crosses:
                inner.append(segment) if len(segment.chunks) > 1 else single.append(segment.chunks[0])
        source = target = None
        if segments[0].receives:
            source = CALLER if first == 0 else slice_owner(edges.index(first) - 1, cp_size)
        if segments[-1].sends:
            target = CALLER if last == seq_length else slice_owner(edges.index(last), cp_size)
        crossing = tuple(segment for segment in segments if segment.crosses)
        prefix.append(ScanStage((offset, offset + last - first), crossing, source, target))
        offset += last - first
    return Plan(
        seq_length,
        chunk_size,
        bounds,
        cp_size,
        cp_rank,
        prefix=tuple(prefix),
        inner=tuple(inner),
        single_chunk_documents=tuple(single),
        chunk_lengths=tuple(lengths),
    )


def _check_alignment(edges: list[int], bounds: tuple[int, ...], chunk_size: int) -> None:
    """Raise LayoutError if a chunk crosses a slice edge: a carry holds the updates of whole chunks only."""
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
