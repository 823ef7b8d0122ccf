"""Find spans of local queries and the range of keys that they may attend to."""

from dataclasses import dataclass
from functools import lru_cache

from inplace_ttt.ttt.plan import check_documents, document_parts, local_slices, slice_bounds


@dataclass(frozen=True)
class QuerySpan:
    """Describe consecutive local queries of one document and the keys, in the whole sequence, that they attend to."""

    local: slice
    keys: slice


@lru_cache(maxsize=64)
def query_spans(
    seq_length: int, documents: tuple[int, ...] | None, cp_size: int, cp_rank: int, window: int | None
) -> tuple[QuerySpan, ...]:
    """Cut a rank's queries into spans with one range of keys each.

    Args:
        seq_length: length of the whole sequence.
        documents: document bounds in the whole sequence; None: one document.
        window: size of a sliding window, which also limits the span length (to max(window, 256)); None: no window.
    """
    bounds, edges = check_documents(documents, seq_length), slice_bounds(seq_length, cp_size)
    spans, base = [], 0
    for index in local_slices(cp_size, cp_rank):
        first, last = edges[index], edges[index + 1]
        for start, _, left, right in document_parts(bounds, first, last):
            step = right - left if window is None else max(window, 256)
            for begin in range(left, right, step):
                stop = min(begin + step, right)
                oldest = start if window is None else max(start, begin - window + 1)
                local = slice(begin - first + base, stop - first + base)
                spans.append(QuerySpan(local, slice(oldest, stop)))
        base += last - first
    return tuple(spans)


@lru_cache(maxsize=64)
def query_runs(
    seq_length: int, documents: tuple[int, ...] | None, cp_size: int, cp_rank: int
) -> tuple[tuple[QuerySpan, ...], ...]:
    """Group the query spans into runs in which both queries and keys are contiguous. Arguments as in query_spans."""
    runs = []
    for span in query_spans(seq_length, documents, cp_size, cp_rank, None):
        last = runs[-1][-1] if runs else None
        if last and (last.local.stop, last.keys.stop) == (span.local.start, span.keys.start):
            runs[-1].append(span)
        else:
            runs.append([span])
    return tuple(map(tuple, runs))
