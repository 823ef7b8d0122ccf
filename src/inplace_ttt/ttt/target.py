"""What a chunk is taught: a depthwise convolution of the inputs inside the chunk, then a projection.

``c_t[e] = sum_k w[e, 0, k] * u_{t + k - kernel // 2}[e]`` over taps in t's own chunk, and ``v_t = c_t P``. A tap
into another chunk would let the update of a chunk hold tokens from its future.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inplace_ttt.ttt.chunked import state_dtype


def chunk_ids(chunk_lengths: tuple[int, ...]) -> Tensor:
    """(s,) int32 on the CPU: for each token a number that its chunk alone has, from ``Plan.chunk_lengths``."""
    lengths = torch.tensor(chunk_lengths)
    return torch.repeat_interleave(torch.arange(len(chunk_lengths), dtype=torch.int32), lengths)


def chunk_target(u: Tensor, weight: Tensor, projection: Tensor | None, chunk_ids: Tensor) -> Tensor:
    """Targets of all tokens: depthwise convolution that never leaves a chunk, then the projection.

    Only u is kept for the backward, which the layer keeps anyway.

    Args:
        u: (s, b, d).
        weight: (d, 1, kernel), kernel odd.
        projection: (d, d), applied from the right. None: none.
        chunk_ids: (s,) integers; neighbouring tokens are of one chunk where theirs are equal.

    Returns:
        (s, b, d)
    """
    v, _ = _ChunkTarget.apply(u, weight, projection, chunk_ids, u.shape[0])
    return v


def begin_chunk_target(
    u: Tensor, weight: Tensor, projection: Tensor | None, chunk_ids: Tensor
) -> tuple[Tensor, Callable[[], None]]:
    """``chunk_target`` of the first half of the tokens, which a chunk must end with, in a tensor of all of them, and
    what makes the others: to be called before they are read."""
    return _ChunkTarget.apply(u, weight, projection, chunk_ids, u.shape[0] // 2)


class _ChunkTarget(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, weight, projection, chunk_ids, first: int):
        ctx.save_for_backward(u, weight, projection, chunk_ids)
        v = torch.empty_like(u, memory_format=torch.contiguous_format)
        memory = v.data  # autograd takes what is written to v for another value of it, not for the rest of this one

        @torch.no_grad()
        def make(part: slice) -> None:
            c = _for(u).conv(u[part], weight, chunk_ids[part])
            if projection is None:
                memory[part] = c
            else:
                torch.mm(c.flatten(0, 1), projection, out=memory[part].flatten(0, 1))

        make(slice(0, first))
        return v, lambda: make(slice(first, None))

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        u, weight, projection, chunk_ids = ctx.saved_tensors
        here, dprojection = _for(u), None
        if projection is not None:
            c = here.conv(u, weight, chunk_ids)
            dprojection = c.flatten(0, 1).t() @ g.flatten(0, 1)
            g = g @ projection.t()
        du, dweight = here.conv_backward(g.contiguous(), u, weight, chunk_ids)
        return du, dweight, dprojection, None, None


def _for(u: Tensor):
    """The module with ``conv`` and ``conv_backward`` for a tensor: the kernels', or this one."""
    if u.is_cuda and u.dtype != torch.float64:
        from inplace_ttt.ttt.kernels import chunk_conv

        return chunk_conv
    return sys.modules[__name__]


def conv(u: Tensor, weight: Tensor, chunk_ids: Tensor) -> Tensor:
    """The convolution alone; arguments as ``chunk_target``'s."""
    out = torch.zeros_like(u)
    for tap, here, there, inside in _taps(u.shape[0], weight.shape[-1], chunk_ids):
        reached = u[there] if inside is None else u[there] * inside
        out[here].addcmul_(reached, weight[:, 0, tap].expand_as(reached))
    return out


def conv_backward(g: Tensor, u: Tensor, weight: Tensor, chunk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u and weight from the output's, g (s, b, d)."""
    du = torch.zeros_like(u)
    dweight = torch.zeros(weight.shape, dtype=state_dtype(weight.dtype), device=u.device)
    for tap, here, there, inside in _taps(u.shape[0], weight.shape[-1], chunk_ids):
        reaching = g[here] if inside is None else g[here] * inside
        du[there].addcmul_(reaching, weight[:, 0, tap].expand_as(reaching))
        dweight[:, 0, tap] = (reaching * u[there]).sum(dim=(0, 1), dtype=dweight.dtype)
    return du, dweight.to(weight.dtype)


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
