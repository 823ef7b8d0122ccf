"""Compute ``heads.make_heads`` in Triton, in one pass over memory forward and one backward.

A row of the kernels is one head of one token, in the order of the QKV projection: queries, key and value of each group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from inplace_ttt.megatron.kernels import programs_of

ROWS = 16  # heads that a program holds at a time


@triton.jit
def _row(number, rows, EACH: tl.constexpr, UNITS: tl.constexpr):
    """Return for each row its token, its index among all queries and among all groups, and if it is a query, a key."""
    token, unit = number // UNITS, number % UNITS
    group, part = unit // (EACH + 2), unit % (EACH + 2)
    groups = UNITS // (EACH + 2)
    query = token * (groups * EACH) + group * EACH + part
    return token, query, token * groups + group, (part < EACH) & (number < rows), (part == EACH) & (number < rows)


@triton.jit
def _weights(weights, half, inside, is_query, CHANNELS: tl.constexpr, HALF: tl.constexpr):
    """Return the lower and the upper half of the norm's weight of each row."""
    query_low = tl.load(weights + half, mask=inside, other=0.0)[None, :]
    query_high = tl.load(weights + HALF + half, mask=inside, other=0.0)[None, :]
    key_low = tl.load(weights + CHANNELS + half, mask=inside, other=0.0)[None, :]
    key_high = tl.load(weights + CHANNELS + HALF + half, mask=inside, other=0.0)[None, :]
    return tl.where(is_query, query_low, key_low), tl.where(is_query, query_high, key_high)


@triton.jit
def _heads_kernel(
    qkv,  # (tokens, UNITS, 2 HALF)
    table,  # (tokens / batch, 2 HALF) fp32: cosines, sines
    weights,  # (2, 2 HALF) fp32: of queries and of keys
    query,  # (tokens, groups * EACH, 2 HALF)
    key,  # (tokens, groups, 2 HALF)
    value,  # (tokens, groups, 2 HALF)
    rows,
    batch,
    eps,
    EACH: tl.constexpr,
    UNITS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NORMED: tl.constexpr,
    ROTATED: tl.constexpr,
):
    CHANNELS: tl.constexpr = 2 * HALF
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, of_query, of_group, is_query, is_key = _row(number, rows, EACH, UNITS)
    is_query, is_key, known = is_query[:, None], is_key[:, None], (number < rows)[:, None]
    half = tl.arange(0, BLOCK)
    inside = half < HALF
    mask, place = known & inside[None, :], number[:, None] * CHANNELS + half[None, :]
    low = tl.load(qkv + place, mask=mask, other=0.0)
    high = tl.load(qkv + place + HALF, mask=mask, other=0.0)
    to_value = of_group[:, None] * CHANNELS + half[None, :]
    is_value = mask & ~is_query & ~is_key
    tl.store(value + to_value, low, mask=is_value)
    tl.store(value + to_value + HALF, high, mask=is_value)
    low, high = low.to(tl.float32), high.to(tl.float32)
    if NORMED:
        squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
        scale = tl.rsqrt(squares / CHANNELS + eps)[:, None]
        weight_low, weight_high = _weights(weights, half, inside, is_query, CHANNELS, HALF)
        low, high = low * scale * weight_low, high * scale * weight_high
    if ROTATED:
        angle = (token // batch)[:, None] * CHANNELS + half[None, :]
        cos = tl.load(table + angle, mask=mask, other=0.0)
        sin = tl.load(table + angle + HALF, mask=mask, other=0.0)
        low, high = low * cos - high * sin, high * cos + low * sin
    dtype = query.dtype.element_ty
    to_query = of_query[:, None] * CHANNELS + half[None, :]
    tl.store(query + to_query, low.to(dtype), mask=mask & is_query)
    tl.store(query + to_query + HALF, high.to(dtype), mask=mask & is_query)
    tl.store(key + to_value, low.to(dtype), mask=mask & is_key)
    tl.store(key + to_value + HALF, high.to(dtype), mask=mask & is_key)


@triton.jit
def _heads_backward_kernel(
    qkv,  # (tokens, UNITS, 2 HALF); read if NORMED
    table,  # (tokens / batch, 2 HALF) fp32: cosines, sines
    weights,  # (2, 2 HALF) fp32: of queries and of keys
    dquery,  # (tokens, groups * EACH, 2 HALF)
    dkey,  # (tokens, groups, 2 HALF)
    dvalue,  # (tokens, groups, 2 HALF)
    dqkv,  # (tokens, UNITS, 2 HALF)
    dweights,  # (programs, 2, 2 HALF)
    rows,
    batch,
    eps,
    EACH: tl.constexpr,
    UNITS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NORMED: tl.constexpr,
    ROTATED: tl.constexpr,
):
    CHANNELS: tl.constexpr = 2 * HALF
    program, programs = tl.program_id(0), tl.num_programs(0)
    half = tl.arange(0, BLOCK)
    inside = half < HALF
    # sums of the weights' gradients, by row of the tile
    query_low = tl.zeros((ROWS, BLOCK), tl.float32)
    query_high = tl.zeros((ROWS, BLOCK), tl.float32)
    key_low = tl.zeros((ROWS, BLOCK), tl.float32)
    key_high = tl.zeros((ROWS, BLOCK), tl.float32)
    first = program.to(tl.int64) * ROWS
    while first < rows:
        number = first + tl.arange(0, ROWS)
        token, of_query, of_group, is_query, is_key = _row(number, rows, EACH, UNITS)
        is_query, is_key = is_query[:, None], is_key[:, None]
        mask = (number < rows)[:, None] & inside[None, :]
        place = number[:, None] * CHANNELS + half[None, :]
        from_query = of_query[:, None] * CHANNELS + half[None, :]
        from_group = of_group[:, None] * CHANNELS + half[None, :]
        is_value = mask & ~is_query & ~is_key
        low = tl.load(dvalue + from_group, mask=is_value, other=0.0)
        high = tl.load(dvalue + from_group + HALF, mask=is_value, other=0.0)
        tl.store(dqkv + place, low, mask=is_value)
        tl.store(dqkv + place + HALF, high, mask=is_value)
        low = tl.load(dquery + from_query, mask=mask & is_query, other=0.0).to(tl.float32)
        high = tl.load(dquery + from_query + HALF, mask=mask & is_query, other=0.0).to(tl.float32)
        low += tl.load(dkey + from_group, mask=mask & is_key, other=0.0).to(tl.float32)
        high += tl.load(dkey + from_group + HALF, mask=mask & is_key, other=0.0).to(tl.float32)
        turned = mask & (is_query | is_key)
        if ROTATED:
            angle = (token // batch)[:, None] * CHANNELS + half[None, :]
            cos = tl.load(table + angle, mask=turned, other=0.0)
            sin = tl.load(table + angle + HALF, mask=turned, other=0.0)
            low, high = low * cos + high * sin, high * cos - low * sin
        if NORMED:
            normed_low = tl.load(qkv + place, mask=turned, other=0.0).to(tl.float32)
            normed_high = tl.load(qkv + place + HALF, mask=turned, other=0.0).to(tl.float32)
            squares = tl.sum(normed_low * normed_low, axis=1) + tl.sum(normed_high * normed_high, axis=1)
            scale = tl.rsqrt(squares / CHANNELS + eps)[:, None]
            normed_low, normed_high = normed_low * scale, normed_high * scale
            for_low, for_high = low * normed_low, high * normed_high
            query_low += tl.where(is_query, for_low, 0.0)
            query_high += tl.where(is_query, for_high, 0.0)
            key_low += tl.where(is_key, for_low, 0.0)
            key_high += tl.where(is_key, for_high, 0.0)
            weight_low, weight_high = _weights(weights, half, inside, is_query, CHANNELS, HALF)
            low, high = low * weight_low, high * weight_high
            shared = ((tl.sum(low * normed_low, axis=1) + tl.sum(high * normed_high, axis=1)) / CHANNELS)[:, None]
            low, high = (low - normed_low * shared) * scale, (high - normed_high * shared) * scale
        dtype = dqkv.dtype.element_ty
        tl.store(dqkv + place, low.to(dtype), mask=turned)
        tl.store(dqkv + place + HALF, high.to(dtype), mask=turned)
        first += programs * ROWS
    if NORMED:
        place = program * 2 * CHANNELS + half
        tl.store(dweights + place, tl.sum(query_low, axis=0), mask=inside)
        tl.store(dweights + place + HALF, tl.sum(query_high, axis=0), mask=inside)
        tl.store(dweights + place + CHANNELS, tl.sum(key_low, axis=0), mask=inside)
        tl.store(dweights + place + CHANNELS + HALF, tl.sum(key_high, axis=0), mask=inside)


def make_heads(
    qkv: Tensor, table: Tensor | None, weights: Tensor | None, groups: int, channels: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query (s, b, heads, channels), key and value (s, b, groups, channels).

    Args:
        qkv: (s, b, (heads + 2 groups) * channels), contiguous.
        table: (s, 1, 1, channels) fp32, cosines and sines; None: no RoPE.
        weights: (2, channels) fp32, of the norms of queries and keys; None: no norms.
    """
    s, b, width = qkv.shape
    heads = width // channels - 2 * groups
    query, key, value = (qkv.new_empty(s, b, number, channels) for number in (heads, groups, groups))
    rows = s * b * (heads + 2 * groups)
    _heads_kernel[(triton.cdiv(rows, ROWS),)](
        qkv, table, weights, query, key, value, rows, b, eps, **_sizes(heads, groups, channels, table, weights)
    )
    return query, key, value


def make_heads_backward(
    qkv: Tensor | None,
    table: Tensor | None,
    weights: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of qkv, and of weights or None, given those of query, key and value.

    ``qkv`` is read only if there are weights. Other arguments: see ``make_heads``. All are contiguous.
    """
    s, b, heads, channels = gradients[0].shape
    groups = gradients[1].shape[2]
    units = heads + 2 * groups
    dqkv = gradients[0].new_empty(s, b, units * channels)
    rows = s * b * units
    number = max(1, min(programs_of(dqkv, 16), triton.cdiv(rows, ROWS)))
    dweights = None
    if weights is not None:
        dweights = torch.empty(number, 2, channels, dtype=torch.float32, device=dqkv.device)
    _heads_backward_kernel[(number,)](
        qkv, table, weights, *gradients, dqkv, dweights, rows, b, eps, **_sizes(heads, groups, channels, table, weights)
    )
    return dqkv, None if dweights is None else dweights.sum(dim=0)


def _sizes(heads: int, groups: int, channels: int, table: Tensor | None, weights: Tensor | None) -> dict:
    return dict(
        EACH=heads // groups,
        UNITS=heads + 2 * groups,
        HALF=channels // 2,
        BLOCK=triton.next_power_of_2(channels // 2),
        ROWS=ROWS,
        NORMED=weights is not None,
        ROTATED=table is not None,
        num_warps=4,
    )
