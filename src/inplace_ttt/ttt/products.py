"""Multiply matrices over the tokens of chunks, batched over evenly spaced chunks."""

import itertools

import torch
from torch import Tensor

from inplace_ttt.ttt.plan import Span, evenly_spaced

# Tokens per batch of Gram matrices: 64 MiB of fp32 for documents of 2048 tokens
GRAM_TOKENS = 8192


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tokens: fp32, or fp64 for fp64 operands."""
    return torch.promote_types(dtype, torch.float32)


def outer_sum(a: Tensor, z: Tensor) -> Tensor:
    """Return ``a^T z`` in the state's dtype: a (t, k) and z (t, f) -> (k, f), or with a batch dimension before t."""
    dtype = state_dtype(z.dtype)
    if z.is_cuda and z.dtype != dtype:  # tensor cores accumulate low-precision operands in fp32
        product = torch.mm if a.dim() == 2 else torch.bmm
        return product(a.mT, z, out_dtype=dtype)
    return a.mT.to(dtype) @ z.to(dtype)


def add_outer_sum(state: Tensor, a: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
    """Add ``scale * a^T z`` to the state (k, f), in place, and return it; a (t, k), z (t, f)."""
    if a.dtype == state.dtype:
        return state.addmm_(a.t(), z, alpha=scale)
    return state.add_(outer_sum(a, z), alpha=scale)


def stack_spans(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Return a view (spans, tokens per span, k) of x (s, k) at evenly spaced spans."""
    start, stop = spans[0]
    distance = (spans[1][0] if len(spans) > 1 else stop) - start
    return x[start : spans[-1][1]].unfold(0, stop - start, distance).mT


def gram(x: Tensor) -> Tensor:
    """Return ``x x^T`` of each matrix, (n, t, k) -> (n, t, t), in x's dtype.

    On a GPU large matrices use symmetry: the upper right block is copied from the lower left one.
    """
    n, t, _ = x.shape
    if not x.is_cuda or t < 512:
        return x @ x.mT
    result, half = x.new_empty(n, t, t), t // 2
    first, second = x[:, :half], x[:, half:]
    torch.bmm(first, first.mT, out=result[:, :half, :half])
    torch.bmm(second, second.mT, out=result[:, half:, half:])
    torch.bmm(second, first.mT, out=result[:, half:, :half])
    result[:, :half, half:] = result[:, half:, :half].mT
    return result


def prefers_gram(tokens: int, d: int, f: int) -> bool:
    """Return True if the norm of a sum of outer products costs less from Gram matrices than from the sum."""
    return tokens * (d + f) < d * f


def squared_norms(
    v: Tensor,  # (n, t, d)
    z: Tensor,  # (n, t, f)
) -> Tensor:  # (n,)
    """Return the squared Frobenius norms of ``sum_t v_t z_t^T``, in the state's dtype.

    They are computed from the smaller product: the sum itself, (d, f), or the Gram matrices (t, t), because
    ``|sum_t v_t z_t^T|^2 = sum_tu (v_t . v_u) (z_t . z_u)``.
    """
    t, d, f = v.shape[1], v.shape[2], z.shape[2]
    if not prefers_gram(t, d, f):
        pairs = zip(v, z, strict=True)
        return torch.stack([torch.linalg.vector_norm(outer_sum(*pair)).square() for pair in pairs])
    few = max(1, GRAM_TOKENS // t)
    norms = [
        (outer_sum(some_v.mT, some_v.mT) * outer_sum(some_z.mT, some_z.mT)).sum((1, 2))
        for some_v, some_z in zip(v.split(few), z.split(few), strict=True)
    ]
    return torch.cat(norms).clamp(min=0)


def squared_norms_of_spans(v: Tensor, z: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Return the squared norms of ``sum_t v_t z_t^T`` over the tokens t of each span, (b, spans).

    Args:
        v: (s, b, d).
        z: (s, b, f).
    """
    norms = torch.empty(z.shape[1], len(spans), dtype=state_dtype(z.dtype), device=z.device)
    first = 0
    for group in evenly_spaced(spans):
        last = first + len(group)
        for batch in range(z.shape[1]):
            norms[batch, first:last] = squared_norms(*(stack_spans(t[:, batch], group) for t in (v, z)))
        first = last
    return norms


def span_products(spans: tuple[Span, ...], matrices: Tensor):
    """Yield (group of evenly spaced spans, their matrices (spans of the group, ...)); matrices is (spans, ...)."""
    first = 0
    for group in evenly_spaced(spans):
        yield group, matrices[first : first + len(group)]
        first += len(group)


def row_edges(d: int, count: int, units: tuple[int, ...]) -> list[slice]:
    """Split d rows into at most ``count`` blocks, which start at multiples of the largest unit that permits it.

    ``units`` are in descending order and end with 1.
    """
    count = min(count, d)
    unit = next(unit for unit in units if d >= count * unit)
    edges = [round(d * part / count / unit) * unit for part in range(count)] + [d]
    return [slice(low, high) for low, high in itertools.pairwise(edges)]
