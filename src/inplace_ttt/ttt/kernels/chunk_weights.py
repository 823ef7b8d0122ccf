"""The weights of many chunks from one accumulator: the sweep as a matrix product whose K axis is time.

``sum_t a_t z_t^T`` over all tokens is a product (rows, t) x (t, f), and its accumulator, as K advances, *is* the fast
weights' state. So each program keeps one fp32 tile of the state in registers over the whole sequence and, at every
chunk boundary, stores what the state then amounts to in bf16. Per chunk 2 d f bytes are written; a state in memory
would be read and written in fp32 besides. README.md has the derivation and the measurements.
"""

import functools
from collections.abc import Iterator, Sequence

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

from inplace_ttt.ttt.chunked import Window
from inplace_ttt.ttt.kernels.schedule import COLUMNS, GOES_ON, Schedule, make_schedule
from inplace_ttt.ttt.plan import Segment

# A program's tile of the state, and the tokens that one step adds to it: 128 fp32 registers a thread for the tile,
# and in shared memory six steps on their way (144 KB) beside a tile of bf16 weights on its way out (64 KB).
BLOCK_ROWS, BLOCK_F, BLOCK_T, STAGES, WARPS = 128, 256, 32, 6, 8
# Columns of bf16 that lie together in a tile's shared memory (128 bytes, the width of its swizzle), and the least rows
# of them that one transfer takes to memory
PIECE_F, LEAST_PIECE_ROWS = 64, 32
# Chunk sizes are multiples of this: of others the last step of every chunk would be partly empty
CHUNK_MULTIPLE = 64
# Chunk weights held at a time where they are not kept, in bytes; and where sums are exchanged between ranks, who would
# wait for each other's products between one window and the next
WINDOW_BYTES = 768 * 2**20
EXCHANGE_BYTES = 2 * WINDOW_BYTES


@gluon.jit
def _load_step(
    number,  # of the step, in the order of the sweep
    total,  # steps there are
    tokens,
    a_desc,
    z_desc,
    a_tiles,
    z_tiles,
    arrived,
    row0,
    col0,
    STAGES: gl.constexpr,
):
    """Have the operands of a step on their way to its slot in shared memory."""
    there = number < total
    token = gl.load(tokens + number, mask=there, other=0)
    slot = number % STAGES
    mbarrier.expect(arrived.index(slot), a_desc.block_type.nbytes + z_desc.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(a_desc, [token, row0], arrived.index(slot), a_tiles.index(slot), pred=there)
    tma.async_copy_global_to_shared(z_desc, [token, col0], arrived.index(slot), z_tiles.index(slot), pred=there)


@gluon.jit
def _keep_tokens(slot, count, BLOCK_T: gl.constexpr, WIDTH: gl.constexpr, num_warps: gl.constexpr):
    """Zero what a slot holds of tokens after the first ``count``: they are another document's, or nobody's."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    values = slot.load(layout)
    inside = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, layout)) < count
    slot.store(gl.where(inside[:, None], values, gl.zeros([BLOCK_T, WIDTH], values.dtype, layout=layout)))


@gluon.jit
def _add_step(
    state,
    number,  # of the step
    count,  # of its tokens; None: BLOCK_T
    a_tiles,
    z_tiles,
    arrived,
    BLOCK_ROWS: gl.constexpr,
    BLOCK_F: gl.constexpr,
    BLOCK_T: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """The state with a step's tokens added, a full step's still under way; the step before has left its slot."""
    slot = number % STAGES
    mbarrier.wait(arrived.index(slot), (number // STAGES) & 1)
    if count is not None:
        _keep_tokens(a_tiles.index(slot), count, BLOCK_T, BLOCK_ROWS, num_warps)
        _keep_tokens(z_tiles.index(slot), count, BLOCK_T, BLOCK_F, num_warps)
        fence_async_shared()
    a_tile = a_tiles.index(slot).permute((1, 0))
    state = warpgroup_mma(a_tile, z_tiles.index(slot), state, is_async=True)
    return warpgroup_mma_wait(num_outstanding=1 if count is None else 0, deps=(state,))


@gluon.jit
def _store_piece(
    piece,  # its number in the tile, down the rows of its columns first
    place,  # of the chunk's weight
    weights_desc,
    pieces,  # (number, 1, rows, columns)
    row0,
    col0,
    BLOCK_ROWS: gl.constexpr,
):
    """Have a piece of the chunk's weight leave shared memory."""
    height: gl.constexpr = weights_desc.block_type.shape[1]
    width: gl.constexpr = weights_desc.block_type.shape[2]
    row = row0 + piece % (BLOCK_ROWS // height) * height
    col = col0 + piece // (BLOCK_ROWS // height) * width
    tma.async_copy_shared_to_global(weights_desc, [place, row, col], pieces.index(piece))


@gluon.jit
def _read(tensor, stride, r, c, inside):
    return gl.load(tensor + r[:, None] * stride + c[None, :], mask=inside, other=0.0).to(gl.float32)


# They differ from sequence to sequence: one compiled kernel is for all
NUMBERS = ["first_chunk", "chunks", "first_step", "total", "made", "carried"]


@gluon.jit(do_not_specialize=NUMBERS)
def _chunk_weights_kernel(
    a_desc,  # (t, rows)
    z_desc,  # (t, f)
    weights_desc,  # (chunks that see anything, rows, f): what they see
    table,  # (chunks, COLUMNS): see schedule.py
    tokens,  # (steps,): the first of each step
    base,  # (rows, f) or None
    before,  # (rows, f) fp32 or None: what the first chunk's document wrote before it
    after,  # (rows, f) fp32 or None: what the last chunk's document wrote up to here; may be `before`
    add_to,  # (rows, f) fp32 or None: to it is added what each document wrote up to its end
    norms,  # (documents, programs) fp32 or None: the squared norm of the same, the part of each program's tile
    rows,
    f,
    base_stride,  # between rows of base
    before_stride,
    after_stride,
    add_to_stride,
    first_chunk,
    chunks,
    first_step,
    total,  # steps there are
    made,  # weights there are to make
    carried,  # 1 if `before` is to be read, else 0
    scale,  # of everything written
    inverse,  # 1 / scale
    REVERSED: gl.constexpr,  # weights come from the last to the first
    COLUMNS: gl.constexpr,
    GOES_ON: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    BLOCK_F: gl.constexpr,
    BLOCK_T: gl.constexpr,
    STAGES: gl.constexpr,
    LEAVING: gl.constexpr,  # how a tile of weights lies in shared memory
    num_warps: gl.constexpr,
):
    """The accumulator holds the state over ``scale``, the base included: storing a chunk's weight reads nothing.

    Loads run ahead of the products by STAGES - 1 steps, across the ends of chunks and documents. A chunk's weight waits
    in shared memory and leaves it piece by piece, one before each of the chunk's steps: all programs come to a chunk's
    end together, and whole tiles would come to memory at once. A chunk of fewer steps leaves the rest to its end.
    """
    tile: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_F, 16]
    )
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_T, BLOCK_ROWS], a_desc.layout)
    z_tiles = gl.allocate_shared_memory(z_desc.dtype, [STAGES, BLOCK_T, BLOCK_F], z_desc.layout)
    PIECES: gl.constexpr = BLOCK_ROWS * BLOCK_F // weights_desc.block_type.numel
    leaving = gl.allocate_shared_memory(weights_desc.dtype, [BLOCK_ROWS, BLOCK_F], LEAVING)
    pieces = leaving._reinterpret(weights_desc.dtype, [PIECES] + weights_desc.block_type.shape, weights_desc.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(arrived.index(slot), count=1)
    fence_async_shared()

    program = gl.program_id(0)
    row_tiles = gl.cdiv(rows, BLOCK_ROWS)
    # neighbours in time share a column tile of z, which is the wider operand
    row0 = (program % row_tiles) * BLOCK_ROWS
    col0 = (program // row_tiles) * BLOCK_F
    table += first_chunk * COLUMNS
    tokens += first_step
    for number in gl.static_range(STAGES - 1):
        _load_step(number, total, tokens, a_desc, z_desc, a_tiles, z_tiles, arrived, row0, col0, STAGES)

    r = row0 + gl.arange(0, BLOCK_ROWS, layout=gl.SliceLayout(1, tile))
    c = col0 + gl.arange(0, BLOCK_F, layout=gl.SliceLayout(0, tile))
    inside = (r < rows)[:, None] & (c < f)[None, :]
    r = r.to(gl.int64)

    number = 0
    done = 0
    stored = 0
    place = 0  # of the weight that waits
    piece = PIECES  # of it that leaves next
    while number < chunks:  # for each document
        state = gl.zeros([BLOCK_ROWS, BLOCK_F], gl.float32, layout=tile)
        if base is not None:
            state += _read(base, base_stride, r, c, inside)
        if before is not None:
            state += _read(before, before_stride, r, c, inside & (number < carried))
        state *= inverse
        ends = GOES_ON
        goes_on = True
        while goes_on:  # for each of its chunks
            row = table + number * COLUMNS  # WHOLE, LEFT, SEES, ENDS
            whole, left, sees, ends = gl.load(row), gl.load(row + 1), gl.load(row + 2), gl.load(row + 3)
            if sees != 0:
                weight = (state * scale).to(weights_desc.dtype)
                tma.store_wait(pendings=0)  # the last chunk's has left
                leaving.store(weight)
                fence_async_shared()
                place = made - 1 - stored if REVERSED else stored
                piece = 0
                stored += 1
            for _ in range(0, whole):
                if piece < PIECES:
                    _store_piece(piece, place, weights_desc, pieces, row0, col0, BLOCK_ROWS)
                    piece += 1
                state = _add_step(
                    state, done, None, a_tiles, z_tiles, arrived, BLOCK_ROWS, BLOCK_F, BLOCK_T, STAGES, num_warps
                )
                next_step = done + STAGES - 1
                _load_step(next_step, total, tokens, a_desc, z_desc, a_tiles, z_tiles, arrived, row0, col0, STAGES)
                done += 1
            while piece < PIECES:
                _store_piece(piece, place, weights_desc, pieces, row0, col0, BLOCK_ROWS)
                piece += 1
            state = warpgroup_mma_wait(num_outstanding=0, deps=(state,))
            if left > 0:
                state = _add_step(
                    state, done, left, a_tiles, z_tiles, arrived, BLOCK_ROWS, BLOCK_F, BLOCK_T, STAGES, num_warps
                )
                next_step = done + STAGES - 1
                _load_step(next_step, total, tokens, a_desc, z_desc, a_tiles, z_tiles, arrived, row0, col0, STAGES)
                done += 1
            number += 1
            goes_on = (number < chunks) & (ends == GOES_ON)
        if after is not None or add_to is not None or norms is not None:
            state *= scale
            if base is not None:
                state -= _read(base, base_stride, r, c, inside)
            if after is not None:
                here = after + r[:, None] * after_stride + c[None, :]
                gl.store(here, state, mask=inside & (number == chunks))
            if ends >= 0:
                if norms is not None:
                    squares = gl.sum(gl.sum(state * state, axis=1), axis=0)
                    gl.store(norms + ends * gl.num_programs(0) + program, squares)
                if add_to is not None:
                    here = add_to + r[:, None] * add_to_stride + c[None, :]
                    gl.store(here, state + gl.load(here, mask=inside, other=0.0), mask=inside)

    tma.store_wait(pendings=0)
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(arrived.index(slot))


@functools.cache
def _layout(*block: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)


def _descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block), _layout(*block))


def chunk_weights(
    a: Tensor,
    z: Tensor,
    schedule: Schedule,
    window: range,
    *,
    scale: float,
    base: Tensor | None = None,
    before: Tensor | None = None,
    after: Tensor | None = None,
    add_to: Tensor | None = None,
    norms: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The weights that chunks see: ``base + before + scale * sum a_t^T z_t``, over the tokens of their document that
    come before them.

    Args:
        a: (t, rows) bf16.
        z: (t, f) bf16.
        window: the numbers of the schedule's chunks that are swept.
        base: (rows, f) bf16.
        before: (rows, f) fp32, what the first chunk's document wrote before it.
        after: (rows, f) fp32, filled with what the last chunk's document wrote up to there; may be ``before`` itself.
        add_to: (rows, f) fp32, to which the same of each document that ends here is added.
        norms: (documents, programs) fp32, filled with the squared norm of the same: that of each program's tile.
        out: (weights or more, rows, f) bf16, where they go. None: into new memory.

    Returns:
        (chunks that see anything, rows, f) bf16, in the order of tokens.
    """
    rows, f = a.shape[1], z.shape[1]
    first, last = window[0], window[-1] + 1
    made = schedule.seen[last] - schedule.seen[first]
    if out is None:
        out = torch.empty(max(made, 1), rows, f, dtype=z.dtype, device=z.device)  # a descriptor needs something
    start = before
    if before is None and base is None:  # a state of constant zeros would have ptxas wait for each product (C7515)
        start = add_to if add_to is not None else after
    _chunk_weights_kernel[(programs(rows, f),)](
        _descriptor(a, BLOCK_T, BLOCK_ROWS),
        _descriptor(z, BLOCK_T, BLOCK_F),
        _descriptor(out, 1, *_piece(schedule.steps_a_chunk)),
        schedule.table,
        schedule.tokens,
        base,
        start,
        after,
        add_to,
        norms,
        rows,
        f,
        *(0 if tensor is None else tensor.stride(0) for tensor in (base, start, after, add_to)),
        first,
        last - first,
        schedule.steps[first],
        schedule.steps[last] - schedule.steps[first],
        made,
        int(before is not None),
        scale,
        1.0 / scale,
        REVERSED=schedule.reverse,
        COLUMNS=COLUMNS,
        GOES_ON=GOES_ON,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_F=BLOCK_F,
        BLOCK_T=BLOCK_T,
        STAGES=STAGES,
        LEAVING=_layout(BLOCK_ROWS, BLOCK_F),
        num_warps=WARPS,
    )
    return out[:made]


def _piece(steps: int) -> tuple[int, int]:
    """Rows and columns of a tile's pieces, of which one leaves before each of so many steps; of few, the whole tile."""
    across = BLOCK_F // PIECE_F
    if steps < across:
        return BLOCK_ROWS, BLOCK_F
    down = 2 ** ((steps // across).bit_length() - 1)
    return max(BLOCK_ROWS // down, LEAST_PIECE_ROWS), PIECE_F


def programs(rows: int, f: int) -> int:
    """How many tiles the state has."""
    return triton.cdiv(rows, BLOCK_ROWS) * triton.cdiv(f, BLOCK_F)


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


def sweep(
    segments: Sequence[Segment],
    base: Tensor | None,
    carry: Tensor | None,
    a: Tensor,
    z: Tensor,
    scale: float,
    *,
    going: Tensor | None = None,
    add_to: Tensor | None = None,
    norms: Tensor | None = None,
    room: int | None = None,
    out: Tensor | None = None,
) -> Iterator[Window]:
    """``chunked.sweep`` with as many chunks a window as fit in ``room`` bytes (None: WINDOW_BYTES), at least one.

    ``out`` (chunks or more, rows, f) takes the weights of all chunks, which are then one window.
    """
    schedule = make_schedule(
        tuple(segments),
        BLOCK_T,
        based=base is not None,
        carried=carry is not None,
        goes_elsewhere=going is not None,
        to_the_end=add_to is not None or norms is not None,
        stream=torch.cuda.current_stream(z.device) if z.is_cuda else None,
    )
    rows, f = a.shape[1], z.shape[1]
    most = max(1, (WINDOW_BYTES if room is None else room) // (2 * rows * f))
    if out is not None:
        most = len(schedule.chunks)
    of_tiles = None
    if norms is not None:
        of_tiles = torch.empty(schedule.documents, programs(rows, f), dtype=torch.float32, device=z.device)
    running = None  # takes the sum from window to window, where a document goes on
    before = carry
    for window in schedule.windows(most):
        after = going if window.stop == len(schedule.chunks) else None
        if schedule.goes_on[window[-1]]:
            if running is None:
                running = torch.empty(rows, f, dtype=torch.float32, device=z.device)
            after = running
        weights = chunk_weights(
            a, z, schedule, window,
            scale=scale, base=base, before=before, after=after, add_to=add_to, norms=of_tiles, out=out,
        )  # fmt: skip
        before = after
        if len(weights):
            yield schedule.that_see(window), weights
        del weights  # unless the caller keeps them, their memory is the next window's
    if norms is not None:
        torch.sum(of_tiles, 1, out=norms)
