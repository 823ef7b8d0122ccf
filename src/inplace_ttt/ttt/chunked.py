"""The chunk-parallel form on one device: pure functions on one row of the batch.

Inside a chunk the fast weight is constant, so its tokens go through one matrix product; between chunks a single
fp32 state is updated in place. Whatever the length of the sequence, a sweep holds three d x f matrices: the base,
the state, and their sum rounded to the dtype of the operands.

    a  (t, rows)  what is written: eta * v in the prefix sweep, the gradient g in the suffix sweep
    z  (t, f)     where it is written
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from inplace_ttt.ttt.plan import Segment, Span


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over tokens: fp32, or fp64 where the operands are."""
    return torch.promote_types(dtype, torch.float32)


def add_outer(state: Tensor, a: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
    """``state += scale * a^T z`` in the state's dtype, in place; returns the state."""
    if a.dtype == state.dtype:
        return state.addmm_(a.t(), z, alpha=scale)
    if a.is_cuda:  # tensor cores take the low precision as it is and accumulate in fp32
        return state.add_(torch.mm(a.t(), z, out_dtype=state.dtype), alpha=scale)
    return state.addmm_(a.t().to(state.dtype), z.to(state.dtype), alpha=scale)


def segment_sum(segment: Segment, a: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
    """The sum over all tokens of a segment, ``scale * sum_t a_t z_t^T``: (rows, f) in the state's dtype."""
    tokens = slice(*segment.tokens)
    state = torch.zeros(a.shape[1], z.shape[1], dtype=state_dtype(z.dtype), device=z.device)
    return add_outer(state, a[tokens], z[tokens], scale)


def sweep(
    segment: Segment, base: Tensor | None, a: Tensor, z: Tensor, scale: float, whole: Tensor | None = None
) -> Iterator[tuple[Span, Tensor | None]]:
    """For each chunk in the order of the segment, the sum of ``base`` and of what the chunks before it wrote.

    Yields ``(tokens, weight)``, the weight (rows, f) in z's dtype and valid until the next step; None is zero.
    ``whole`` (rows, f), if given, starts at zero and ends as what all the segment's chunks wrote; without it,
    what the last chunk writes is not computed, for no chunk sees it.
    """
    state = whole
    if state is None and len(segment.chunks) > 1:
        state = torch.zeros(a.shape[1], z.shape[1], dtype=state_dtype(z.dtype), device=z.device)
    written = False
    for number, chunk in enumerate(segment.chunks, start=1):
        tokens = slice(*chunk)
        if not written:
            weight = None if base is None else base.to(z.dtype)
        elif base is None:
            weight = state.to(z.dtype)
        elif base.dtype == state.dtype == z.dtype:
            weight = base + state
        else:
            weight = (base.to(state.dtype) + state).to(z.dtype)
        yield chunk, weight
        if number < len(segment.chunks) or whole is not None:
            add_outer(state, a[tokens], z[tokens], scale)
            written = True
