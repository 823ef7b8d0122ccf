"""Scale matrix rows in Triton, in one pass over memory; torch's broadcasting needs two to three passes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _scale_kernel(x, factors, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + column, mask=column < WIDTH).to(tl.float32)
        tl.store(x + row * stride + column, (factor * value).to(x.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _dot_and_scale_kernel(
    x,  # (rows, width)
    y,  # (rows, width)
    factors,  # (rows,)
    dots,  # (rows,)
    x_stride,
    y_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row)
    products = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        products += value * tl.load(y + row * y_stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        tl.store(x + row * x_stride + column, (factor * value).to(x.dtype.element_ty), mask=column < WIDTH)
    tl.store(dots + row, tl.sum(products, axis=0))


def scale_rows(x: Tensor, factors: Tensor) -> None:
    """Compute ``clipping.scale_rows``: x (rows, width) with contiguous rows, factors (rows,) fp32."""
    _scale_kernel[(x.shape[0],)](x, factors.contiguous(), x.stride(0), WIDTH=x.shape[1], BLOCK=BLOCK)


def dot_and_scale_rows(x: Tensor, y: Tensor, factors: Tensor) -> Tensor:
    """Compute ``clipping.dot_and_scale_rows``: x and y (rows, width), factors (rows,) -> (rows,) fp32."""
    factors = factors.contiguous()
    dots = torch.empty_like(factors)
    _dot_and_scale_kernel[(x.shape[0],)](x, y, factors, dots, x.stride(0), y.stride(0), WIDTH=x.shape[1], BLOCK=BLOCK)
    return dots
