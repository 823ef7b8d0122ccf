"""The weights of many chunks from one accumulator: the sweep as a matrix product whose K axis is time.

``sum_t a_t z_t^T`` over all tokens is a product (rows, t) x (t, f), and its accumulator, as K advances, *is* the fast
weights' state. So each program keeps one fp32 tile of the state in registers over the whole sequence and, at every
chunk boundary, stores what the state then amounts to in bf16. Per chunk 2 d f bytes are written; a state in memory
would be read and written in fp32 besides. README.md has the derivation and the measurements.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from inplace_ttt.ttt import chunked
from inplace_ttt.ttt.chunked import Window, add_outer
from inplace_ttt.ttt.plan import Segment

BLOCK_ROWS, BLOCK_F, BLOCK_T = 128, 256, 64
# Chunk weights held at a time where they are not kept, in bytes
WINDOW_BYTES = 384 * 2**20


@triton.jit
def _chunk_weights_kernel(
    a_desc,  # (t, rows)
    z_desc,  # (t, f)
    weights_desc,  # (chunks, rows, f): what each chunk sees
    base,  # (rows, f) or None
    before,  # (rows, f) fp32 or None: what was written before these chunks
    after,  # (rows, f) fp32 or None: the same and what these chunks wrote; may be `before`
    rows,
    f,
    base_stride,  # between rows of base
    before_stride,
    after_stride,
    chunks,  # to make weights of
    accumulated,  # of which this many write: all, or all but the last
    steps,  # BLOCK_T tokens each, in a chunk
    scale,  # of everything written
    inverse,  # 1 / scale
    REVERSED: tl.constexpr,  # from the last chunk to the first
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The accumulator holds the state over ``scale``, the base included: storing a chunk's weight reads nothing."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    # neighbours in time share a column tile of z, which is the wider operand
    row0 = (program % row_tiles) * BLOCK_ROWS
    col0 = (program // row_tiles) * BLOCK_F
    r = row0 + tl.arange(0, BLOCK_ROWS)
    c = col0 + tl.arange(0, BLOCK_F)
    inside = (r < rows)[:, None] & (c < f)[None, :]
    r = r.to(tl.int64)

    state = tl.zeros((BLOCK_ROWS, BLOCK_F), tl.float32)
    if base is not None:
        state += tl.load(base + r[:, None] * base_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if before is not None:
        state += tl.load(before + r[:, None] * before_stride + c[None, :], mask=inside, other=0.0)
    state *= inverse

    for number in tl.range(0, chunks):
        chunk = chunks - 1 - number if REVERSED else number
        # in halves: half the shared memory, which the loads of the next chunk take
        left, right = state.reshape(BLOCK_ROWS, 2, BLOCK_F // 2).permute(0, 2, 1).split()
        weights_desc.store([chunk, row0, col0], (left * scale).to(weights_desc.dtype)[None])
        weights_desc.store([chunk, row0, col0 + BLOCK_F // 2], (right * scale).to(weights_desc.dtype)[None])
        if number < accumulated:
            for step in tl.range(0, steps):
                token = (chunk * steps + step) * BLOCK_T
                a_tile = a_desc.load([token, row0])
                z_tile = z_desc.load([token, col0])
                state = tl.dot(a_tile.T, z_tile, state)

    if after is not None:
        state *= scale
        if base is not None:
            state -= tl.load(base + r[:, None] * base_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(after + r[:, None] * after_stride + c[None, :], state, mask=inside)


def chunk_weights(
    a: Tensor,
    z: Tensor,
    *,
    chunk_size: int,
    chunks: int,
    accumulated: int,
    scale: float,
    base: Tensor | None = None,
    before: Tensor | None = None,
    after: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """The weight that each chunk sees: ``base + before + scale * sum a_t^T z_t`` over the chunks that come before it.

    Args:
        a: (t, rows) bf16, at least ``accumulated`` chunks.
        z: (t, f) bf16.
        chunks: how many weights to make.
        accumulated: how many chunks write, ``chunks`` or one less: what the last writes matters to ``after`` alone.
        base: (rows, f) bf16.
        before: (rows, f) fp32.
        after: (rows, f) fp32, filled with ``before`` and what the accumulated chunks wrote; may be ``before`` itself.
        reverse: chunks come in the order from the last to the first.

    Returns:
        (chunks, rows, f) bf16, in the order of tokens.
    """
    rows, f = a.shape[1], z.shape[1]
    weights = torch.empty(chunks, rows, f, dtype=z.dtype, device=z.device)
    _chunk_weights_kernel[(triton.cdiv(rows, BLOCK_ROWS) * triton.cdiv(f, BLOCK_F),)](
        TensorDescriptor(a, list(a.shape), list(a.stride()), [BLOCK_T, BLOCK_ROWS]),
        TensorDescriptor(z, list(z.shape), list(z.stride()), [BLOCK_T, BLOCK_F]),
        TensorDescriptor(weights, list(weights.shape), list(weights.stride()), [1, BLOCK_ROWS, BLOCK_F // 2]),
        base,
        before,
        after,
        rows,
        f,
        0 if base is None else base.stride(0),
        0 if before is None else before.stride(0),
        0 if after is None else after.stride(0),
        chunks,
        accumulated,
        chunk_size // BLOCK_T,
        scale,
        1.0 / scale,
        REVERSED=reverse,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_F=BLOCK_F,
        BLOCK_T=BLOCK_T,
        num_warps=8,
        num_stages=4,
    )
    return weights


def why_unsupported(z: Tensor, v: Tensor, chunk_size: int, eta: float) -> str | None:
    """What keeps the kernel from these operands; None: nothing."""
    if z.dtype != torch.bfloat16:
        return f"operands are {z.dtype}, not bfloat16"
    if chunk_size % BLOCK_T:
        return f"chunk_size={chunk_size} is not a multiple of {BLOCK_T}"
    for name, size in (("f", z.shape[2]), ("d", v.shape[2])):
        if size % 64:
            return f"{name}={size} is not a multiple of 64"
    if eta == 0:
        return "eta=0"
    return None


def sweep(
    segment: Segment,
    base: Tensor | None,
    carry: Tensor | None,
    a: Tensor,
    z: Tensor,
    scale: float,
    total: Tensor | None = None,
    keep: bool = False,
) -> Iterator[Window]:
    """``chunked.sweep`` with many chunks a window.

    A window holds as many chunks as fit in ``WINDOW_BYTES`` (at least one); with ``keep``, all of the segment.
    """
    chunks = list(segment.chunks)
    size = max(stop - start for start, stop in chunks)
    if size % BLOCK_T:  # a document shorter than a chunk
        yield from chunked.sweep(segment, base, carry, a, z, scale, total)
        return
    reverse = len(chunks) > 1 and chunks[1] < chunks[0]
    if base is None and carry is None:
        # The first weight is zero. What its chunk writes, which alone may be shorter here, is where the next starts.
        first = slice(*chunks.pop(0))
        if total is not None or chunks:
            carry = add_outer(torch.zeros(a.shape[1], z.shape[1], device=z.device), a[first], z[first], scale)
        if not chunks:
            if total is not None:
                total.copy_(carry)
            return
    most = len(chunks) if keep else max(1, WINDOW_BYTES // (2 * a.shape[1] * z.shape[1]))
    running = total
    if running is None and len(chunks) > most:  # takes the sum from window to window
        running = torch.empty(a.shape[1], z.shape[1], device=z.device)
    while chunks:
        window, chunks = chunks[:most], chunks[most:]
        start, stop = window[-1]
        short = stop - start < size  # the end of a document, in reading order
        accumulated = len(window) - (short or (not chunks and total is None))
        ordered = window[::-1] if reverse else window
        tokens = slice(ordered[0][0], ordered[-1][1])
        weights = chunk_weights(
            a[tokens],
            z[tokens],
            chunk_size=size,
            chunks=len(window),
            accumulated=accumulated,
            scale=scale,
            base=base,
            before=carry,
            after=running,
            reverse=reverse,
        )
        carry = running
        yield tuple(ordered), weights
        del weights  # unless the caller keeps them, their memory is the next window's
        if short and total is not None:
            add_outer(total, a[start:stop], z[start:stop], scale)
