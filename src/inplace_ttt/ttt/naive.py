"""The definition of In-Place Test-Time Training: a loop over chunks, differentiated by autograd.

Every faster version in this package is tested against these two functions, in outputs and in gradients.
Symbols as in the paper (Feng et al., arXiv 2604.06169, section 3):

    z  input of the down-projection     v  target       W  down-projection, the fast weight
    s  sequence    b  batch    d  hidden size    f  feed-forward size    C  chunk size
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def fast_weight_linear(
    z: Tensor,  # (s, b, f)
    v: Tensor,  # (s, b, d)
    weight: Tensor,  # (d, f)
    *,
    eta: float,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,)
) -> Tensor:  # (s, b, d)
    """Down-projection whose weight learns while it reads; apply, then update.

    The tokens of chunk i of a document see ``W + eta * sum_{j < i} sum_{t in chunk j} v_t z_t^T``.
    Documents start at ``cu_seqlens`` (the same in every row of the batch); without it, each row is one document.
    """
    s, b, _ = z.shape
    bounds = [0, s] if cu_seqlens is None else cu_seqlens.tolist()
    rows = []
    for row in range(b):
        outputs = []
        for start, end in itertools.pairwise(bounds):
            fast_weight = weight
            for first in range(start, end, chunk_size):
                chunk = slice(first, min(first + chunk_size, end))
                outputs.append(z[chunk, row] @ fast_weight.T)
                fast_weight = fast_weight + eta * v[chunk, row].T @ z[chunk, row]
        rows.append(torch.cat(outputs))
    return torch.stack(rows, dim=1)


def target(
    u: Tensor,  # (s, b, d)
    conv_weight: Tensor,  # (d, 1, kernel)
    projection: Tensor | None,  # (d, d)
    *,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # (s, b, d)
    """What a chunk is taught: ``v_t = conv(u)_t P``, the convolution zero-padded at the edges of each chunk."""
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
