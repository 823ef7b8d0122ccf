"""Compute the cross-entropy in Triton: one pass over the logits for each part, where torch needs three or four."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _best_and_sums_kernel(logits, best, sums, stride, HERE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)  # by lane: the largest so far, and the sum relative to it
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, HERE, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + column, mask=column < HERE, other=float("-inf"))
        higher = tl.maximum(top, value)
        known = higher != float("-inf")  # -inf - -inf is NaN
        total = total * tl.where(known, tl.exp(top - higher), 1.0) + tl.where(known, tl.exp(value - higher), 0.0)
        total += tl.where(value == value, 0.0, value)  # the largest of NaN and a number is the number: keep the NaN
        top = higher
    largest = tl.max(top, axis=0)
    known = top != float("-inf")
    tl.store(best + row, largest)
    tl.store(sums + row, tl.sum(tl.where(known, total * tl.exp(top - largest), total), axis=0))


@triton.jit
def _logit_gradients_kernel(
    logits,  # (rows, columns)
    log_sum,  # (rows,)
    label,  # (rows,)
    counts,  # (rows,)
    gradients,  # (rows, columns)
    stride,
    gradients_stride,
    here,
    columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * stride + column, mask=column < here, other=float("-inf"))
    gradient = tl.exp(value - tl.load(log_sum + row)) - (column == tl.load(label + row)).to(tl.float32)
    gradient = tl.where((tl.load(counts + row) != 0) & (column < here), gradient, 0.0)
    place = gradients + row * gradients_stride + column
    tl.store(place, gradient.to(gradients.dtype.element_ty), mask=column < columns)


def best_and_sums(logits: Tensor, here: int) -> tuple[Tensor, Tensor]:
    """Compute ``loss.best_and_sums``."""
    best, sums = (torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(2))
    _best_and_sums_kernel[(logits.shape[0],)](logits, best, sums, logits.stride(0), HERE=here, BLOCK=BLOCK, num_warps=8)
    return best, sums


def logit_gradients(
    logits: Tensor, log_sum: Tensor, label: Tensor, counts: Tensor, here: int, dtype: torch.dtype
) -> Tensor:
    """Compute ``loss.logit_gradients``."""
    gradients = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    grid = logits.shape[0], triton.cdiv(logits.shape[1], BLOCK)
    _logit_gradients_kernel[grid](
        logits,
        log_sum,
        label,
        counts,
        gradients,
        logits.stride(0),
        gradients.stride(0),
        here,
        logits.shape[1],
        BLOCK=BLOCK,
        num_warps=8,
    )
    return gradients
