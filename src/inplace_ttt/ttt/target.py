"""What a chunk is taught: a depthwise convolution of the inputs inside the chunk, then a projection.

``c_t[e] = sum_k w[e, 0, k] * u_{t + k - kernel // 2}[e]`` over taps in t's own chunk, and ``v_t = c_t P``. A tap
into another chunk would let the update of a chunk hold tokens from its future.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunk_ids(chunk_lengths: tuple[int, ...]) -> Tensor:
    """(s,) int32 on the CPU: for each token a number that its chunk alone has, from ``Plan.chunk_lengths``."""
    lengths = torch.tensor(chunk_lengths)
    return torch.repeat_interleave(torch.arange(len(chunk_lengths), dtype=torch.int32), lengths)


def chunk_conv(u: Tensor, weight: Tensor, chunk_ids: Tensor) -> Tensor:
    """Depthwise convolution that never leaves a chunk.

    Args:
        u: (s, b, d).
        weight: (d, 1, kernel), kernel odd.
        chunk_ids: (s,) integers; neighbouring tokens are of one chunk where theirs are equal.

    Returns:
        (s, b, d)
    """
    return _ChunkConv.apply(u, weight, chunk_ids)


def _taps(length: int, kernel: int, chunk_ids: Tensor):
    """For each tap: its index, the tokens that it reaches, the tokens it reaches from there, and where it counts."""
    for tap in range(kernel):
        shift = tap - kernel // 2
        if abs(shift) >= length:
            continue
        here = slice(max(0, -shift), length - max(0, shift))
        there = slice(max(0, shift), length + min(0, shift))
        inside = None if shift == 0 else (chunk_ids[here] == chunk_ids[there]).view(-1, 1, 1)
        yield tap, here, there, inside


class _ChunkConv(torch.autograd.Function):
    """Written out so that only u is kept for the backward, which the layer keeps anyway."""

    @staticmethod
    def forward(ctx, u, weight, chunk_ids):
        ctx.save_for_backward(u, weight, chunk_ids)
        out = torch.zeros_like(u)
        for tap, here, there, inside in _taps(u.shape[0], weight.shape[-1], chunk_ids):
            reached = u[there] if inside is None else u[there] * inside
            out[here].addcmul_(reached, weight[:, 0, tap].expand_as(reached))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        u, weight, chunk_ids = ctx.saved_tensors
        du = torch.zeros_like(u)
        dweight = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=u.device)
        for tap, here, there, inside in _taps(u.shape[0], weight.shape[-1], chunk_ids):
            reaching = g[here] if inside is None else g[here] * inside
            du[there].addcmul_(reaching, weight[:, 0, tap].expand_as(reaching))
            dweight[:, 0, tap] = (reaching * u[there]).sum(dim=(0, 1), dtype=dweight.dtype)
        return du, dweight.to(weight.dtype), None
