"""Compute the chunk-local convolution of ``target.py`` in Triton: one pass over memory forward, one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from inplace_ttt.ttt.products import state_dtype

BLOCK_T, BLOCK_D = 32, 64
STRETCH = 256  # tokens per CTA in the backward


@triton.jit
def _reach(tensor, ids, own, token, column, shift, s, width, inside):
    """Load ``tensor`` at tokens + shift, (BLOCK_T, BLOCK_D) fp32; zero outside the token's own chunk."""
    there = token + shift
    same = (there >= 0) & (there < s)
    same &= tl.load(ids + there, mask=same, other=-1) == own
    place = there[:, None].to(tl.int64) * width + column[None, :]
    return tl.load(tensor + place, mask=same[:, None] & inside, other=0.0).to(tl.float32)


@triton.jit
def _conv_kernel(
    u,  # (s, width): width is the batch times d
    weight,  # (d, taps)
    ids,  # (s,)
    out,  # (s, width)
    s,
    width,
    d,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (token < s)[:, None] & (column < width)[None, :]
    own = tl.load(ids + token, mask=token < s, other=-2)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for tap in tl.static_range(TAPS):
        factor = tl.load(weight + (column % d) * TAPS + tap).to(tl.float32)
        total += factor[None, :] * _reach(u, ids, own, token, column, tap - TAPS // 2, s, width, inside)
    tl.store(out + token[:, None].to(tl.int64) * width + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _conv_backward_kernel(
    g,  # (s, width)
    u,  # (s, width)
    weight,  # (d, taps)
    ids,  # (s,)
    du,  # (s, width)
    dweight,  # (stretches, TAPS, width) fp32
    s,
    width,
    d,
    TAPS: tl.constexpr,
    STRETCH: tl.constexpr,  # tokens of one CTA, a multiple of BLOCK_T
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    stretch = tl.program_id(1)
    for tap in tl.static_range(TAPS):  # one tap at a time: sums stay in registers, tokens in the cache
        shift = tap - TAPS // 2
        products = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for first in range(0, STRETCH, BLOCK_T):
            token = stretch * STRETCH + first + tl.arange(0, BLOCK_T)
            inside = (token < s)[:, None] & (column < width)[None, :]
            own = tl.load(ids + token, mask=token < s, other=-2)
            gradient = tl.load(g + token[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0)
            products += gradient.to(tl.float32) * _reach(u, ids, own, token, column, shift, s, width, inside)
        sums = dweight + (stretch.to(tl.int64) * TAPS + tap) * width + column
        tl.store(sums, tl.sum(products, axis=0), mask=column < width)
    for first in range(0, STRETCH, BLOCK_T):
        token = stretch * STRETCH + first + tl.arange(0, BLOCK_T)
        inside = (token < s)[:, None] & (column < width)[None, :]
        own = tl.load(ids + token, mask=token < s, other=-2)
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for tap in tl.static_range(TAPS):
            factor = tl.load(weight + (column % d) * TAPS + tap).to(tl.float32)
            shift = TAPS // 2 - tap
            total += factor[None, :] * _reach(g, ids, own, token, column, shift, s, width, inside)
        tl.store(du + token[:, None].to(tl.int64) * width + column[None, :], total.to(du.dtype.element_ty), mask=inside)


def _grid(s: int, width: int) -> tuple[int, int]:
    return triton.cdiv(width, BLOCK_D), triton.cdiv(s, BLOCK_T)


def conv(u: Tensor, weight: Tensor, chunk_ids: Tensor) -> Tensor:
    """Compute ``target.conv``: u (s, b, d), weight (d, 1, taps), chunk_ids (s,) -> (s, b, d)."""
    u, out = u.contiguous(), torch.empty_like(u, memory_format=torch.contiguous_format)
    (s, b, d), taps = u.shape, weight.shape[-1]
    _conv_kernel[_grid(s, b * d)](
        u, weight.contiguous(), chunk_ids, out, s, b * d, d, TAPS=taps, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D
    )
    return out


def conv_backward(g: Tensor, u: Tensor, weight: Tensor, chunk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``target.conv_backward``: the gradients of u and weight from g (s, b, d)."""
    g, u = g.contiguous(), u.contiguous()
    (s, b, d), taps = u.shape, weight.shape[-1]
    grid = triton.cdiv(b * d, BLOCK_D), triton.cdiv(s, STRETCH)
    du = torch.empty_like(u)
    sums = torch.empty(grid[1], taps, b, d, dtype=torch.float32, device=u.device)
    _conv_backward_kernel[grid](
        g,
        u,
        weight.contiguous(),
        chunk_ids,
        du,
        sums,
        s,
        b * d,
        d,
        TAPS=taps,
        STRETCH=STRETCH,
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
    )
    dweight = sums.sum(dim=(0, 2), dtype=state_dtype(u.dtype)).t().reshape(weight.shape)
    return du, dweight.to(weight.dtype)
