"""The weights of many chunks from one accumulator: the sweep as a matrix product whose K axis is time.

``sum_t a_t z_t^T`` over all tokens is a product (rows, t) x (t, f), and its accumulator, as K advances, *is* the fast
weights' state. So each program keeps one fp32 tile of the state in registers over the whole sequence and, at every
chunk boundary, stores what the state then amounts to in bf16. Per chunk 2 d f bytes are written; a state in memory
would be read and written in fp32 besides. README.md has the derivation and the measurements.
"""

import functools
from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from inplace_ttt.ttt import chunked
from inplace_ttt.ttt.chunked import Window, add_outer, outer
from inplace_ttt.ttt.plan import Segment

# A program's tile of the state, and the tokens that one step adds to it: 128 fp32 registers a thread for the tile,
# and in shared memory six steps on their way (144 KB) beside a tile of bf16 weights on its way out (64 KB).
BLOCK_ROWS, BLOCK_F, BLOCK_T, STAGES, WARPS = 128, 256, 32, 6, 8
# Chunk sizes are multiples of this
CHUNK_MULTIPLE = 64
# Chunk weights held at a time where they are not kept, in bytes; and where sums are exchanged between ranks, who would
# wait for each other's products between one window and the next
WINDOW_BYTES = 768 * 2**20
EXCHANGE_BYTES = 2 * WINDOW_BYTES


@gluon.jit
def _load_step(
    number,  # of the step, in the order of the sweep
    total,  # steps there are
    chunks,
    steps,  # in a chunk
    a_desc,
    z_desc,
    a_tiles,
    z_tiles,
    arrived,
    row0,
    col0,
    REVERSED: gl.constexpr,
    BLOCK_T: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Have the operands of a step on their way to its slot in shared memory."""
    chunk = number // steps
    if REVERSED:
        chunk = chunks - 1 - chunk
    token = (chunk * steps + number % steps) * BLOCK_T
    slot = number % STAGES
    there = number < total
    mbarrier.expect(arrived.index(slot), a_desc.block_type.nbytes + z_desc.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(a_desc, [token, row0], arrived.index(slot), a_tiles.index(slot), pred=there)
    tma.async_copy_global_to_shared(z_desc, [token, col0], arrived.index(slot), z_tiles.index(slot), pred=there)


@gluon.jit(do_not_specialize=["chunks", "accumulated"])  # of each document other numbers: one kernel for all
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
    REVERSED: gl.constexpr,  # from the last chunk to the first
    BLOCK_ROWS: gl.constexpr,
    BLOCK_F: gl.constexpr,
    BLOCK_T: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """The accumulator holds the state over ``scale``, the base included: storing a chunk's weight reads nothing.

    Loads run ahead of the products by STAGES - 1 steps, across chunk boundaries; a store drains while the next chunk
    is added up.
    """
    tile: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_F, 16]
    )
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_T, BLOCK_ROWS], a_desc.layout)
    z_tiles = gl.allocate_shared_memory(z_desc.dtype, [STAGES, BLOCK_T, BLOCK_F], z_desc.layout)
    leaving = gl.allocate_shared_memory(weights_desc.dtype, [1, BLOCK_ROWS, BLOCK_F], weights_desc.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(arrived.index(slot), count=1)
    fence_async_shared()

    program = gl.program_id(0)
    row_tiles = gl.cdiv(rows, BLOCK_ROWS)
    # neighbours in time share a column tile of z, which is the wider operand
    row0 = (program % row_tiles) * BLOCK_ROWS
    col0 = (program // row_tiles) * BLOCK_F
    total = accumulated * steps
    for number in gl.static_range(STAGES - 1):
        _load_step(
            number, total, chunks, steps, a_desc, z_desc, a_tiles, z_tiles, arrived, row0, col0,
            REVERSED, BLOCK_T, STAGES,
        )  # fmt: skip

    r = row0 + gl.arange(0, BLOCK_ROWS, layout=gl.SliceLayout(1, tile))
    c = col0 + gl.arange(0, BLOCK_F, layout=gl.SliceLayout(0, tile))
    inside = (r < rows)[:, None] & (c < f)[None, :]
    r = r.to(gl.int64)
    state = gl.zeros([BLOCK_ROWS, BLOCK_F], gl.float32, layout=tile)
    if base is not None:
        state += gl.load(base + r[:, None] * base_stride + c[None, :], mask=inside, other=0.0).to(gl.float32)
    if before is not None:
        state += gl.load(before + r[:, None] * before_stride + c[None, :], mask=inside, other=0.0)
    state *= inverse

    done = 0
    for number in range(0, chunks):
        weight = (state * scale).to(weights_desc.dtype)
        tma.store_wait(pendings=0)  # the last chunk's has left
        leaving.reshape([BLOCK_ROWS, BLOCK_F]).store(weight)
        fence_async_shared()
        chunk = chunks - 1 - number if REVERSED else number
        tma.async_copy_shared_to_global(weights_desc, [chunk, row0, col0], leaving)
        for _ in range(0, steps if number < accumulated else 0):
            here = done % STAGES
            mbarrier.wait(arrived.index(here), (done // STAGES) & 1)
            a_tile = a_tiles.index(here).permute((1, 0))
            state = warpgroup_mma(a_tile, z_tiles.index(here), state, is_async=True)
            state = warpgroup_mma_wait(num_outstanding=1, deps=(state,))  # the step before has left its slot
            _load_step(
                done + STAGES - 1, total, chunks, steps, a_desc, z_desc, a_tiles, z_tiles, arrived, row0, col0,
                REVERSED, BLOCK_T, STAGES,
            )  # fmt: skip
            done += 1
        state = warpgroup_mma_wait(num_outstanding=0, deps=(state,))

    tma.store_wait(pendings=0)
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(arrived.index(slot))
    if after is not None:
        state *= scale
        if base is not None:
            state -= gl.load(base + r[:, None] * base_stride + c[None, :], mask=inside, other=0.0).to(gl.float32)
        gl.store(after + r[:, None] * after_stride + c[None, :], state, mask=inside)


@functools.cache
def _layout(*block: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)


def _descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block), _layout(*block))


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
    out: Tensor | None = None,
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
        out: (chunks or more, rows, f) bf16, where the weights go. None: into new memory.

    Returns:
        (chunks, rows, f) bf16, in the order of tokens.
    """
    rows, f = a.shape[1], z.shape[1]
    weights = torch.empty(chunks, rows, f, dtype=z.dtype, device=z.device) if out is None else out[:chunks]
    _chunk_weights_kernel[(triton.cdiv(rows, BLOCK_ROWS) * triton.cdiv(f, BLOCK_F),)](
        _descriptor(a, BLOCK_T, BLOCK_ROWS),
        _descriptor(z, BLOCK_T, BLOCK_F),
        _descriptor(weights, 1, BLOCK_ROWS, BLOCK_F),
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
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return weights


def why_unsupported(z: Tensor, v: Tensor, chunk_size: int, eta: float) -> str | None:
    """What keeps the kernel from these operands; None: nothing."""
    if torch.cuda.get_device_capability(z.device)[0] != 9:
        return f"{torch.cuda.get_device_name(z.device)} is no Hopper GPU"
    if z.dtype != torch.bfloat16:
        return f"operands are {z.dtype}, not bfloat16"
    if chunk_size % CHUNK_MULTIPLE:
        return f"chunk_size={chunk_size} is not a multiple of {CHUNK_MULTIPLE}"
    for name, size in (("f", z.shape[2]), ("d", v.shape[2])):
        if size % 64:
            return f"{name}={size} is not a multiple of 64"
    if eta == 0:
        return "eta=0"
    return None


def takes(segment: Segment) -> bool:
    """Whether the kernel can sweep a segment: one of a single short chunk may be too odd for it."""
    return max(stop - start for start, stop in segment.chunks) % CHUNK_MULTIPLE == 0


def sweep(
    segment: Segment,
    base: Tensor | None,
    carry: Tensor | None,
    a: Tensor,
    z: Tensor,
    scale: float,
    total: Tensor | None = None,
    room: int | None = None,
    out: Tensor | None = None,
) -> Iterator[Window]:
    """``chunked.sweep`` with as many chunks a window as fit in ``room`` bytes (None: WINDOW_BYTES), at least one.

    ``out`` (chunks or more, rows, f) takes the weights of all chunks, which are then one window.
    """
    if not takes(segment):
        for chunk, weight in chunked.sweep(segment, base, carry, a, z, scale, total):
            yield chunk, weight if out is None else out[:1].copy_(weight)
        return
    chunks = list(segment.chunks)
    size = max(stop - start for start, stop in chunks)
    reverse = len(chunks) > 1 and chunks[1] < chunks[0]
    if base is None and carry is None:
        # The first weight is zero. What its chunk writes, which alone may be shorter here, is where the next starts.
        first = slice(*chunks.pop(0))
        if total is not None or chunks:
            carry = outer(a[first], z[first])
            if scale != 1:
                carry.mul_(scale)
        if not chunks:
            if total is not None:
                total.copy_(carry)
            return
    most = max(1, (WINDOW_BYTES if room is None else room) // (2 * a.shape[1] * z.shape[1]))
    if out is not None:
        most = len(chunks)
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
            out=out,
        )
        carry = running
        yield tuple(ordered), weights
        del weights  # unless the caller keeps them, their memory is the next window's
        if short and total is not None:
            add_outer(total, a[start:stop], z[start:stop], scale)
