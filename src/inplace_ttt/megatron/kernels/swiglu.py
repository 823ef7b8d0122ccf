"""Compute ``swiglu.swiglu`` in Triton: one pass over memory, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _swiglu_kernel(x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + column, mask=inside).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + column, mask=inside).to(tl.float32)
    tl.store(y + row * WIDTH + column, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(x, dy, dx, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = row * 2 * WIDTH + column
    gate = tl.load(x + place, mask=inside).to(tl.float32)
    up = tl.load(x + place + WIDTH, mask=inside).to(tl.float32)
    gradient = tl.load(dy + row * WIDTH + column, mask=inside).to(tl.float32)
    open_ = tl.sigmoid(gate)
    dgate = gradient * up * open_ * (1 + gate * (1 - open_))
    tl.store(dx + place, dgate.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + place + WIDTH, (gradient * gate * open_).to(dx.dtype.element_ty), mask=inside)


def swiglu(x: Tensor) -> Tensor:
    """Return the product (rows, width) of x (rows, 2 width)."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = x.new_empty(rows, width)
    _swiglu_kernel[rows, triton.cdiv(width, BLOCK)](x, y, WIDTH=width, BLOCK=BLOCK, num_warps=4)
    return y


def swiglu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """Return the gradient of x (rows, 2 width), given that of the product, (rows, width)."""
    dx = torch.empty_like(x)
    grid = dy.shape[0], triton.cdiv(dy.shape[1], BLOCK)
    _swiglu_backward_kernel[grid](x, dy, dx, WIDTH=dy.shape[1], BLOCK=BLOCK, num_warps=4)
    return dx
