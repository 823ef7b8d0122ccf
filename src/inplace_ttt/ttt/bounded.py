"""Bound the sum of updates beyond the training length, for inference only.

The bound of a chunk depends on all earlier chunks. Over context-parallel ranks the slices of the sequence are therefore
processed one after the other: a rank waits for the sum of the slice before its own.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt.ops import fast_weight_linear
from inplace_ttt.ttt.plan import LayoutError, local_slices
from inplace_ttt.ttt.products import state_dtype
from inplace_ttt.ttt.rule import PAPER_RULE, UpdateRule
from inplace_ttt.ttt.state import FastWeightState
from inplace_ttt.ttt.target import ChunkTargets


class BoundedSum(NamedTuple):
    """Hold a sum of updates, and the largest norm that it may have."""

    updates: Tensor  # (b, d, f), fp32, or fp64 for fp64 weights
    limits: Tensor  # (b,), same dtype; inf up to the training length


def bounded_fast_weight_linear(
    z: Tensor,  # (s, b, f)
    v: Tensor | ChunkTargets,  # (s, b, d)
    weight: Tensor,  # (d, f)
    *,
    bound: float,
    trained_chunks: int,
    eta: float,
    chunk_size: int,
    clip: float | None = None,
    rule: UpdateRule = PAPER_RULE,
    tp_group: dist.ProcessGroup | None = None,
    cp_group: dist.ProcessGroup | None = None,
    sum_at: int | None = None,
) -> Tensor | tuple[Tensor, BoundedSum]:
    """Apply ``fast_weight_linear`` to one document per row, and bound the sum S of updates beyond the training length.

    ``|S_n|`` is the norm of S after chunk n = ``trained_chunks``. After chunk n and each later chunk, S is scaled down
    to the norm ``bound * |S_n|`` if its norm is larger. Returns the outputs (s, b, d).

    Example::

        >>> z, v, weight = torch.randn(100, 2, 8), torch.randn(100, 2, 4), torch.randn(4, 8)
        >>> options = dict(eta=0.1, chunk_size=10)
        >>> bounded = bounded_fast_weight_linear(z, v, weight, bound=0.5, trained_chunks=4, **options)
        >>> free = fast_weight_linear(z, v, weight, **options)
        >>> torch.allclose(bounded[:40], free[:40]), torch.allclose(bounded[40:], free[40:])
        (True, False)

    Args:
        bound: largest norm of S, divided by ``|S_n|``; above 0.
        trained_chunks: training length in chunks, 1 or more.
        cp_group: ranks that hold two slices of the sequence each, whose lengths are multiples of ``chunk_size``.
        sum_at: number of tokens from the start of the sequence, a multiple of ``chunk_size``. If given, the sum after
            them is also returned, on the rank that has the last of them; other ranks return zeros.
        Other arguments: see ``fast_weight_linear``.

    Raises LayoutError if a slice does not end with a chunk.
    """
    options: dict[str, Any] = dict(eta=eta, chunk_size=chunk_size, clip=clip, rule=rule, tp_group=tp_group)
    ranks, rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
    if sum_at is None and ranks * len(z) <= trained_chunks * chunk_size:
        return fast_weight_linear(z, v, weight, cp_group=cp_group, **options)
    size = len(z) if ranks == 1 else len(z) // 2
    if ranks > 1 and size % chunk_size:
        raise LayoutError(f"a slice has {size} tokens, which is not a multiple of chunk_size={chunk_size}")
    dtype = state_dtype(weight.dtype)
    zero = weight.new_zeros(z.shape[1], *weight.shape, dtype=dtype)
    found = BoundedSum(zero, zero.new_zeros(z.shape[1]))
    carry = BoundedSum(zero, zero.new_full((z.shape[1],), torch.inf))
    slices = [0] if ranks == 1 else local_slices(ranks, rank)
    owner = [0] if ranks == 1 else [index if index < ranks else 2 * ranks - 1 - index for index in range(2 * ranks)]
    parts = []
    for place, index in enumerate(slices):
        if index and owner[index - 1] != rank:
            carry = _receive(carry, owner[index - 1], cp_group)
        here = slice(place * size, (place + 1) * size)
        start = index * size  # the slice's first token in the sequence
        cut = None if sum_at is None else sum_at - start
        out, carry, at_cut = _run(
            z[here], _part(v, here), weight, carry, start // chunk_size, cut, bound, trained_chunks, options
        )
        parts.append(out)
        found = at_cut or found
        if index + 1 < len(owner) and owner[index + 1] != rank:
            _send(carry, owner[index + 1], cp_group)
    out = torch.cat(parts)
    return out if sum_at is None else (out, found)


def _run(
    z: Tensor, v: Tensor | ChunkTargets, weight: Tensor, carry: BoundedSum, before: int, cut: int | None,
    bound: float, trained_chunks: int, options: dict[str, Any],
) -> tuple[Tensor, BoundedSum, BoundedSum | None]:  # fmt: skip
    """Process a slice after ``before`` chunks: in one piece up to the training length, then chunk by chunk.

    Returns the output, the sum after it, and the sum after ``cut`` tokens of the slice, if it has them.
    """
    chunk, length, start = options["chunk_size"], len(z), 0
    parts, at_cut = [], None
    while start < length:
        stop = min(start + chunk * max(1, trained_chunks - before - start // chunk), length)
        if cut is not None and start < cut:
            stop = min(stop, cut)
        nothing = FastWeightState(carry.updates, z[:0], z.new_empty(0, z.shape[1], len(weight)))
        out, state = fast_weight_linear(
            z[start:stop], _part(v, slice(start, stop)), weight, initial_state=nothing, output_final_state=True,
            **options,
        )  # fmt: skip
        parts.append(out)
        carry = carry._replace(updates=state.updates)
        if stop % chunk == 0:
            carry = apply_bound(carry, before + stop // chunk, bound, trained_chunks, options["tp_group"])
        if stop == cut:
            at_cut = carry
        start = stop
    return torch.cat(parts), carry, at_cut


def apply_bound(
    carry: BoundedSum, chunks: int, bound: float, trained_chunks: int, tp_group: dist.ProcessGroup | None
) -> BoundedSum:
    """Scale the sum after this many chunks down to its limit, which it gets at the training length.

    A sum without a limit beyond the training length, of a text that had no bound before, is limited to its norm.
    """
    if chunks < trained_chunks:
        return carry
    norms = _norms(carry.updates, tp_group)
    own = norms * (bound if chunks == trained_chunks else 1.0)
    limits = torch.where(carry.limits.isfinite(), carry.limits, own)
    scales = (limits / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)
    return BoundedSum(carry.updates * scales[:, None, None], limits)


def _send(carry: BoundedSum, rank: int, group: dist.ProcessGroup) -> None:
    for tensor in carry:
        dist.send(tensor.contiguous(), dist.get_global_rank(group, rank), group=group)


def _receive(like: BoundedSum, rank: int, group: dist.ProcessGroup) -> BoundedSum:
    carry = BoundedSum(*(torch.empty_like(tensor) for tensor in like))
    for tensor in carry:
        dist.recv(tensor, dist.get_global_rank(group, rank), group=group)
    return carry


def _part(v: Tensor | ChunkTargets, here: slice) -> Tensor | ChunkTargets:
    if isinstance(v, Tensor):
        return v[here]
    return ChunkTargets(v.u[here], v.weight, v.projection, v.chunk_ids[here], tp_group=v.tp_group)


def _norms(updates: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Return the Frobenius norms (b,) of updates (b, d, f), whose columns ``tp_group`` may split."""
    squares = updates.flatten(1).square().sum(1)
    if tp_group is not None and tp_group.size() > 1:
        dist.all_reduce(squares, group=tp_group)
    return squares.sqrt()
