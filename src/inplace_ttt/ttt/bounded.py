"""Bound on the sum of updates beyond the training length, for inference only.

The bound of a chunk depends on all earlier chunks, so it cannot be computed in parallel over context-parallel ranks.
This function therefore does not support context parallelism.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt.ops import fast_weight_linear
from inplace_ttt.ttt.rule import PAPER_RULE, UpdateRule
from inplace_ttt.ttt.state import FastWeightState
from inplace_ttt.ttt.target import ChunkTargets


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
) -> Tensor:  # (s, b, d)
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
        Other arguments: see ``fast_weight_linear``.
    """
    options: dict[str, Any] = dict(eta=eta, chunk_size=chunk_size, clip=clip, rule=rule, tp_group=tp_group)
    start, stop, length = 0, trained_chunks * chunk_size, len(z)
    if length <= stop:
        return fast_weight_linear(z, v, weight, **options)
    state, limit, parts = None, None, []
    while start < length:
        here = slice(start, min(stop, length))
        if state is not None:
            state = FastWeightState(state.updates, z[:0], z.new_empty(0, z.shape[1], len(weight)))
        out, state = fast_weight_linear(
            z[here], _part(v, here), weight, initial_state=state, output_final_state=True, **options
        )
        parts.append(out)
        norms = _norms(state.updates, tp_group)
        limit = bound * norms if limit is None else limit
        scales = (limit / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)
        state = state._replace(updates=state.updates * scales[:, None, None])
        start, stop = stop, stop + chunk_size
    return torch.cat(parts)


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
