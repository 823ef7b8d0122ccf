"""The chunk-parallel form on one device: pure functions on one row of the batch.

Inside a chunk the fast weight is constant, so its tokens go through one matrix product; between chunks a single
fp32 state is updated in place. Whatever the length of the sequence, a sweep holds no more than the base, the state,
their sum, and that rounded to the dtype of the operands. ``kernels/`` holds the sweep for Hopper, which makes
the weights of many chunks at once; this one is its twin, for every device, dtype and shape.

    a  (t, rows)  what is written: eta * v in the prefix sweep, the gradient g in the suffix sweep
    z  (t, f)     where it is written
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inplace_ttt.ttt.plan import Segment, Span, evenly_spaced

# Chunks in the order of their tokens, and the weight (chunks, rows, f) that each of them sees
Window = tuple[tuple[Span, ...], Tensor]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over tokens: fp32, or fp64 where the operands are."""
    return torch.promote_types(dtype, torch.float32)


def outer(a: Tensor, z: Tensor) -> Tensor:
    """``a^T z`` in the state's dtype, or of each in a batch of them."""
    dtype = state_dtype(z.dtype)
    if z.is_cuda and z.dtype != dtype:  # tensor cores take the low precision as it is and accumulate in fp32
        product = torch.mm if a.dim() == 2 else torch.bmm
        return product(a.mT, z, out_dtype=dtype)
    return a.mT.to(dtype) @ z.to(dtype)


def add_outer(state: Tensor, a: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
    """``state += scale * a^T z``, in place; returns the state."""
    if a.dtype == state.dtype:
        return state.addmm_(a.t(), z, alpha=scale)
    return state.add_(outer(a, z), alpha=scale)


def sweep(
    segments: Sequence[Segment],
    base: Tensor | None,
    carry: Tensor | None,
    a: Tensor,
    z: Tensor,
    scale: float,
    *,
    going: Tensor | None = None,
    add_to: Tensor | None = None,
    norms: Tensor | None = None,
    room: int | None = None,
) -> Iterator[Window]:
    """For each chunk in the order of the segments, the weight it sees: ``base +`` what its document wrote before it.

    Args:
        segments: parts of different documents. Of these only the first may go on from another stop, and only the last
            go on in another one.
        base: (rows, f) in z's dtype. None: zero.
        carry: (rows, f) in the state's dtype, what earlier slices wrote to the first segment's document. None: nothing.
        going: (rows, f) in the state's dtype, filled with what goes on from the last segment. None: nobody wants it.
        add_to: (rows, f) in the state's dtype, to which the sums of all documents that end here are added.
        norms: (documents that end here,) in the state's dtype, filled with the squared norms of their sums. Without
            either, what the last chunk of a document writes is not computed, for no chunk sees it.
        room: bytes that a window's weights may take, one chunk's at least; here it is always one chunk's.

    Yields:
        Chunks and their weights in z's dtype, valid until the next step. Chunks whose weight is zero are left out.
    """
    state = torch.empty(a.shape[1], z.shape[1], dtype=state_dtype(z.dtype), device=z.device)
    ended = 0
    for place, segment in enumerate(segments):
        zero = place > 0 or carry is None
        state.zero_() if zero else state.copy_(carry)
        wanted = going is not None if segment.sends else (add_to is not None or norms is not None)
        for number, chunk in enumerate(segment.chunks, start=1):
            if not zero or base is not None:
                yield (chunk,), _weight(base, None if zero else state, z.dtype)[None]
            if number < len(segment.chunks) or wanted:
                tokens = slice(*chunk)
                add_outer(state, a[tokens], z[tokens], scale)
                zero = False
        if segment.sends:
            if going is not None:
                going.copy_(state)
            continue
        if add_to is not None:
            add_to.add_(state)
        if norms is not None:
            norms[ended] = torch.linalg.vector_norm(state).square()
        ended += 1


def _weight(base: Tensor | None, state: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Their sum, rounded once."""
    if state is None:
        return base
    if base is None:
        return state.to(dtype)
    return (base + state).to(dtype)


def stacked(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """(spans, tokens of each, k), a view of x (s, k) at spans that are evenly spaced."""
    start, stop = spans[0]
    distance = (spans[1][0] if len(spans) > 1 else stop) - start
    return x[start : spans[-1][1]].unfold(0, stop - start, distance).mT


def apply(window: Window, x: Tensor, out: Tensor, *, transpose: bool, alpha: float = 1.0, add: bool = False) -> None:
    """``out_t = alpha * x_t W_i`` (or with ``W_i^T``) for the tokens t of each chunk i; ``add``: on top of ``out``.

    Args:
        x: (s, k).
        out: (s, n), written in place.
        transpose: W_i is (n, k) rather than (k, n).
    """
    chunks, weights = window
    first = 0
    for batch in evenly_spaced(chunks):  # one product for all of them
        factors = weights[first : first + len(batch)]
        if transpose:
            factors = factors.mT
        if len(batch) == 1:
            tokens = slice(*batch[0])
            out[tokens].addmm_(x[tokens], factors[0], beta=add, alpha=alpha)
        else:
            stacked(out, batch).baddbmm_(stacked(x, batch), factors, beta=add, alpha=alpha)
        first += len(batch)
