"""Reading past the trained length: what a text has written is kept as small as it was there, or smaller.

It is for inference alone. Each chunk's bound needs all that was written before it, so ranks of a context-parallel group
would wait for one another: they refuse it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt.ops import fast_weight_linear
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
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:  # (s, b, d)
    """Apply ``fast_weight_linear`` to texts of one document each, and bound the sum S of updates past a length.

    Behind chunk n = ``trained_chunks`` S has the norm ``|S_n|``. There, and behind each later chunk, S is scaled down
    to the norm ``bound * |S_n|`` where its own is larger.

    Example::

        >>> z, v, weight = torch.randn(100, 2, 8), torch.randn(100, 2, 4), torch.randn(4, 8)
        >>> options = dict(eta=0.1, chunk_size=10)
        >>> bounded = bounded_fast_weight_linear(z, v, weight, bound=0.5, trained_chunks=4, **options)
        >>> free = fast_weight_linear(z, v, weight, **options)
        >>> torch.allclose(bounded[:40], free[:40]), torch.allclose(bounded[40:], free[40:])
        (True, False)

    Args:
        bound: above 0.
        trained_chunks: 1 or more.
        Others: as ``fast_weight_linear`` has them.
    """
    options: dict[str, Any] = dict(eta=eta, chunk_size=chunk_size, clip=clip, tp_group=tp_group)
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
    """Return the norm (b,) of each text's sum, whose columns the group shares."""
    squares = updates.flatten(1).square().sum(1)
    if tp_group is not None and tp_group.size() > 1:
        dist.all_reduce(squares, group=tp_group)
    return squares.sqrt()
