"""Compute ``norm.rms_norm`` in Triton. A program holds whole rows, so memory is read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from inplace_ttt.megatron.kernels import programs_of

TILE = 4096  # numbers that a program holds at a time


@triton.jit
def _rms_norm_kernel(
    x,  # (rows, WIDTH)
    weight,  # (WIDTH,)
    y,  # (rows, WIDTH)
    scales,  # (rows,)
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    result = value * scale[:, None] * factor[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit
def _rms_norm_backward_kernel(
    x,  # (rows, WIDTH)
    weight,  # (WIDTH,)
    scales,  # (rows,)
    dy,  # (rows, WIDTH)
    dx,  # (rows, WIDTH)
    dweight,  # (programs, WIDTH)
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    first = program.to(tl.int64) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
        normed = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        gradient = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        total += gradient * normed
        gradient *= factor[None, :]
        shared = tl.sum(gradient * normed, axis=1) / WIDTH
        result = (gradient - normed * shared[:, None]) * scale[:, None]
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
        first += programs * ROWS
    tl.store(dweight + program * WIDTH + column, tl.sum(total, axis=0), mask=column < WIDTH)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed rows, like x (rows, width), and 1 / sqrt(mean(x^2) + eps) of each row, (rows,) fp32."""
    rows, width = x.shape
    y, scales = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    each = max(1, TILE // block)
    grid = (triton.cdiv(rows, each),)
    _rms_norm_kernel[grid](x, weight, y, scales, rows, eps, WIDTH=width, BLOCK=block, ROWS=each, num_warps=8)
    return y, scales


def rms_norm_backward(x: Tensor, weight: Tensor, scales: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (rows, width) and weight (width,), given what ``rms_norm`` returned and dy."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    each = max(1, TILE // block)
    number = max(1, min(programs_of(x), triton.cdiv(rows, each)))
    dx, dweight = torch.empty_like(x), torch.empty(number, width, dtype=torch.float32, device=x.device)
    _rms_norm_backward_kernel[(number,)](
        x, weight, scales, dy, dx, dweight, rows, WIDTH=width, BLOCK=block, ROWS=each, num_warps=8
    )
    return dx, dweight.sum(dim=0).to(weight.dtype)
