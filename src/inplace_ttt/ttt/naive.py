"""Define In-Place Test-Time Training: a loop over chunks, differentiated by autograd.

Outputs and gradients of every faster version in this package are tested against these functions. Symbols as in the
paper (Feng et al., arXiv 2604.06169, section 3):

    z  input of the down-projection     v  target       W  down-projection, the fast weight
    s  sequence    b  batch    d  hidden size    f  feed-forward size    C  chunk size
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from inplace_ttt.ttt.state import FastWeightState, zero_state


def fast_weight_linear(
    z: Tensor,  # (s, b, f)
    v: Tensor,  # (s, b, d)
    weight: Tensor,  # (d, f)
    *,
    eta: float,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,)
    initial_state: FastWeightState | None = None,
    output_final_state: bool = False,
    clip: float | None = None,
) -> Tensor | tuple[Tensor, FastWeightState]:  # (s, b, d)
    """Apply a down-projection with fast weights: apply, then update.

    The tokens of chunk i of a document use ``W + sum_{j < i} dW_j``, ``dW_j = eta * sum_{t in chunk j} v_t z_t^T``.
    Documents start at ``cu_seqlens``, in every row of the batch. Without it, each row is one document.

    Args:
        initial_state: state before the first document's tokens.
        output_final_state: also return the state after the last document.
        clip: rescale ``dW_j`` to the Frobenius norm ``clip * |W|`` if it is larger; ``|W|`` is not differentiated.
    """
    d, (s, b, _) = weight.shape[0], z.shape
    bounds = [0, s] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for row in range(b):
        parts = []
        for document, (start, end) in enumerate(itertools.pairwise(bounds)):
            state = initial_state if document == 0 and initial_state is not None else zero_state(z, d)
            updates, chunk_z, chunk_v = state.updates[row], state.z[:, row], state.v[:, row]
            while start < end:
                stop = min(start + chunk_size - len(chunk_z), end)
                parts.append(z[start:stop, row] @ (weight + updates).T)
                chunk_z = torch.cat([chunk_z, z[start:stop, row]])
                chunk_v = torch.cat([chunk_v, v[start:stop, row]])
                if len(chunk_z) == chunk_size:
                    updates = updates + _clipped(eta * chunk_v.T @ chunk_z, weight, clip)
                    chunk_z, chunk_v = chunk_z[:0], chunk_v[:0]
                start = stop
        outputs.append(torch.cat(parts))
        states.append((updates, chunk_z, chunk_v))
    out = torch.stack(outputs, dim=1)
    if not output_final_state:
        return out
    all_updates, all_z, all_v = zip(*states, strict=True)
    return out, FastWeightState(torch.stack(all_updates), torch.stack(all_z, dim=1), torch.stack(all_v, dim=1))


def _clipped(update: Tensor, weight: Tensor, clip: float | None) -> Tensor:
    """Return the update (d, f), rescaled if its norm is larger than ``clip * |weight|``."""
    if clip is None:
        return update
    limit = clip * weight.detach().norm()
    return update * (limit / update.norm()) if update.norm() > limit else update


def decayed_fast_weight_linear(
    z: Tensor,  # (s, b, f)
    v: Tensor,  # (s, b, d)
    weight: Tensor,  # (d, f)
    *,
    eta: float,
    chunk_size: int,
    decay: float,
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,)
) -> Tensor:  # (s, b, d)
    """Apply a down-projection with decayed updates: chunk j uses ``W + S``, then ``S <- decay * S + dW_j``.

    This rule is not in the paper. It is the example of another update rule for ``rule.UpdateRule``.
    """
    s, b, _ = z.shape
    bounds = [0, s] if cu_seqlens is None else cu_seqlens.tolist()
    outputs = []
    for row in range(b):
        parts = []
        for start, end in itertools.pairwise(bounds):
            state = torch.zeros_like(weight)
            for first in range(start, end, chunk_size):
                chunk = slice(first, min(first + chunk_size, end))
                parts.append(z[chunk, row] @ (weight + state).T)
                state = decay * state + eta * v[chunk, row].T @ z[chunk, row]
        outputs.append(torch.cat(parts))
    return torch.stack(outputs, dim=1)


def target(
    u: Tensor,  # (s, b, d)
    conv_weight: Tensor,  # (d, 1, kernel)
    projection: Tensor | None,  # (d, d)
    *,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # (s, b, d)
    """Return the targets ``v_t = conv(u)_t P``, with the convolution zero-padded at the edges of each chunk."""
    s, _, d = u.shape
    bounds = [0, s] if cu_seqlens is None else cu_seqlens.tolist()
    kernel = conv_weight.shape[-1]
    outputs = []
    for start, end in itertools.pairwise(bounds):
        for first in range(start, end, chunk_size):
            chunk = u[first : min(first + chunk_size, end)]
            mixed = F.conv1d(chunk.permute(1, 2, 0), conv_weight, padding=kernel // 2, groups=d)
            outputs.append(mixed.permute(2, 0, 1))
    c = torch.cat(outputs)
    return c if projection is None else c @ projection
