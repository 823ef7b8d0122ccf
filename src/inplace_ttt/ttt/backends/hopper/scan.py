"""Scan by one matrix product whose K axis is time: the weights of all chunks from one accumulator.

``sum_t a_t z_t^T`` over all tokens is a product (rows, t) x (t, f). As K advances, its accumulator *is* the state of
the fast weights. Each CTA therefore keeps one fp32 tile of the state in registers over the whole sequence and stores
the weight in bf16 at every chunk boundary. This writes 2 d f bytes per chunk; a state in memory would in addition be
read and written in fp32. README.md has the derivation and the measurements.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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

from inplace_ttt.operation import CHUNK_MULTIPLE, EXCHANGE_WINDOW_BYTES, WINDOW_BYTES
from inplace_ttt.ttt.backends.hopper.schedule import COLUMNS, CONTINUES, Schedule, make_schedule
from inplace_ttt.ttt.plan import Segment
from inplace_ttt.ttt.rule import ScanStep
from inplace_ttt.ttt.window import Window, WindowPool

BLOCK_T, STAGES = 32, 6  # tokens per step, and steps in flight


class Tile(NamedTuple):
    """Describe the part of the state of one CTA."""

    rows: int
    columns: int
    warps: int

    def number(self, rows: int, f: int) -> int:
        """Return the number of tiles of a state (rows, f)."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(f, self.columns)


# The large tile takes 128 fp32 registers per thread. Shared memory holds the operands of the steps in flight (144 KB)
# and one tile of bf16 weights to be stored (64 KB). A state with few large tiles, as of a model of 0.1 billion
# parameters, would leave most multiprocessors idle for as long as the CTAs read all tokens.
LARGE, SMALL = Tile(128, 256, warps=8), Tile(64, 128, warps=4)
FEW_TILES = 66  # half of a Hopper GPU's multiprocessors
# Contiguous bf16 columns of a tile in shared memory (128 bytes, the swizzle width), and the smallest number of rows of
# one TMA store
PIECE_F, LEAST_PIECE_ROWS = 64, 32


@gluon.jit
def _load_step(
    number,  # index of the step, in the order of the scan
    steps,  # number of steps
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
    """Start the TMA loads of a step's operands into its slot in shared memory; do nothing after the last step."""
    there = number < steps
    token = gl.load(tokens + number, mask=there, other=0)
    slot = number % STAGES
    mbarrier.expect(arrived.index(slot), a_desc.block_type.nbytes + z_desc.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(a_desc, [token, row0], arrived.index(slot), a_tiles.index(slot), pred=there)
    tma.async_copy_global_to_shared(z_desc, [token, col0], arrived.index(slot), z_tiles.index(slot), pred=there)


@gluon.jit
def _keep_tokens(slot, count, BLOCK_T: gl.constexpr, WIDTH: gl.constexpr, num_warps: gl.constexpr):
    """Zero a slot's tokens after the first ``count``, which belong to another document or to none."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    values = slot.load(layout)
    inside = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, layout)) < count
    slot.store(gl.where(inside[:, None], values, gl.zeros([BLOCK_T, WIDTH], values.dtype, layout=layout)))


@gluon.jit
def _add_step(
    state,
    number,  # index of the step
    count,  # tokens of the step; None: BLOCK_T
    a_tiles,
    z_tiles,
    arrived,
    BLOCK_ROWS: gl.constexpr,
    BLOCK_F: gl.constexpr,
    BLOCK_T: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Return the state with a step's tokens added.

    A full step is still in flight on return. The step before it has finished, so its slot is free.
    """
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
    piece,  # index of the piece in the tile, row-major inside a column panel
    place,  # index of the chunk's weight in the output
    weights_desc,
    pieces,  # (number, 1, rows, columns)
    row0,
    col0,
    BLOCK_ROWS: gl.constexpr,
):
    """Start the store of a piece of the chunk's weight from shared memory."""
    height: gl.constexpr = weights_desc.block_type.shape[1]
    width: gl.constexpr = weights_desc.block_type.shape[2]
    row = row0 + piece % (BLOCK_ROWS // height) * height
    col = col0 + piece // (BLOCK_ROWS // height) * width
    tma.async_copy_shared_to_global(weights_desc, [place, row, col], pieces.index(piece))


@gluon.jit
def _read(tensor, stride, r, c, inside):
    return gl.load(tensor + r[:, None] * stride + c[None, :], mask=inside, other=0.0).to(gl.float32)


# Arguments that differ between sequences; one compiled kernel serves all values
NUMBERS = ["first_chunk", "chunks", "first_step", "steps", "made", "carried"]


@gluon.jit(do_not_specialize=NUMBERS)
def _chunk_weights_kernel(
    a_desc,  # (t, rows)
    z_desc,  # (t, f)
    weights_desc,  # (chunks that use a weight, rows, f)
    table,  # (chunks, COLUMNS): see schedule.py
    tokens,  # (steps,): first token of each step
    base,  # (rows, f) or None
    before,  # (rows, f) fp32 or None: the state before the first chunk
    after,  # (rows, f) fp32 or None: output, the state after the last chunk; may be `before`
    totals,  # (rows, f) fp32 or None: output, receives the sum of the states at document ends
    norms,  # (documents, programs) fp32 or None: output, squared norm of each CTA's tile at document ends
    rows,
    f,
    base_stride,  # elements between rows of base
    before_stride,
    after_stride,
    totals_stride,
    first_chunk,
    chunks,
    first_step,
    steps,  # number of steps
    made,  # number of weights to store
    carried,  # 1 if `before` is to be read, else 0
    scale,  # factor of all updates: eta in the prefix scan, 1 in the suffix scan
    inverse,  # 1 / scale
    REVERSED: gl.constexpr,  # True: scan from the last chunk to the first
    COLUMNS: gl.constexpr,
    CONTINUES: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    BLOCK_F: gl.constexpr,
    BLOCK_T: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Scan a window of chunks. The accumulator holds (base + state) / scale, so storing a weight reads nothing.

    Loads run STAGES - 1 steps ahead of the products, across the ends of chunks and documents. A chunk's weight is
    staged in shared memory and stored piece by piece, one piece before each of the chunk's steps: all CTAs reach the
    end of a chunk at about the same time, and would otherwise all store whole tiles at once. A chunk with fewer steps
    than pieces stores the remaining pieces at its end.
    """
    tile: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_F, 16]
    )
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_T, BLOCK_ROWS], a_desc.layout)
    z_tiles = gl.allocate_shared_memory(z_desc.dtype, [STAGES, BLOCK_T, BLOCK_F], z_desc.layout)
    PIECES: gl.constexpr = BLOCK_ROWS * BLOCK_F // weights_desc.block_type.numel
    # not an argument: hooks on compilation, of which vLLM sets one, get the arguments as JSON, which has no layouts
    stage: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    staging = gl.allocate_shared_memory(weights_desc.dtype, [BLOCK_ROWS, BLOCK_F], stage)
    pieces = staging._reinterpret(weights_desc.dtype, [PIECES] + weights_desc.block_type.shape, weights_desc.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(arrived.index(slot), count=1)
    fence_async_shared()

    program = gl.program_id(0)
    row_tiles = gl.cdiv(rows, BLOCK_ROWS)
    # CTAs with adjacent indices share a column tile of z, the wider operand
    row0 = (program % row_tiles) * BLOCK_ROWS
    col0 = (program // row_tiles) * BLOCK_F
    table += first_chunk * COLUMNS
    tokens += first_step
    for number in gl.static_range(STAGES - 1):
        _load_step(number, steps, tokens, a_desc, z_desc, a_tiles, z_tiles, arrived, row0, col0, STAGES)

    r = row0 + gl.arange(0, BLOCK_ROWS, layout=gl.SliceLayout(1, tile))
    c = col0 + gl.arange(0, BLOCK_F, layout=gl.SliceLayout(0, tile))
    inside = (r < rows)[:, None] & (c < f)[None, :]
    r = r.to(gl.int64)

    number = 0
    done = 0
    stored = 0
    place = 0  # output index of the staged weight
    piece = PIECES  # next piece of the staged weight to store
    while number < chunks:  # for each document
        state = gl.zeros([BLOCK_ROWS, BLOCK_F], gl.float32, layout=tile)
        if base is not None:
            state += _read(base, base_stride, r, c, inside)
        if before is not None:
            state += _read(before, before_stride, r, c, inside & (number < carried))
        state *= inverse
        ends = CONTINUES
        continues = True
        while continues:  # for each of its chunks
            row = table + number * COLUMNS  # WHOLE, LEFT, READS, ENDS
            whole, left, reads, ends = gl.load(row), gl.load(row + 1), gl.load(row + 2), gl.load(row + 3)
            if reads != 0:
                weight = (state * scale).to(weights_desc.dtype)
                tma.store_wait(pendings=0)  # the last chunk's weight has been stored
                staging.store(weight)
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
                _load_step(next_step, steps, tokens, a_desc, z_desc, a_tiles, z_tiles, arrived, row0, col0, STAGES)
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
                _load_step(next_step, steps, tokens, a_desc, z_desc, a_tiles, z_tiles, arrived, row0, col0, STAGES)
                done += 1
            number += 1
            continues = (number < chunks) & (ends == CONTINUES)
        if after is not None or totals is not None or norms is not None:
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
                if totals is not None:
                    here = totals + r[:, None] * totals_stride + c[None, :]
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
    out: Tensor,
    *,
    scale: float,
    base: Tensor | None = None,
    before: Tensor | None = None,
    after: Tensor | None = None,
    total: Tensor | None = None,
    norms: Tensor | None = None,
) -> None:
    """Write the weights that chunks use: ``base + before + scale * sum_t a_t z_t^T``, over earlier tokens t of the
    chunk's document.

    Args:
        a: (t, rows) bf16.
        z: (t, f) bf16.
        schedule: the chunks of the scan.
        window: indices of the schedule's chunks to scan.
        out: (chunks that use a weight, or more, rows, f) bf16, filled in token order.
        scale: factor of all updates, not 0.
        base: (rows, f) bf16. None: zero.
        before: (rows, f) fp32, the state before the first chunk. None: zero.
        after: (rows, f) fp32, receives the state after the last chunk; may be ``before`` itself.
        total: (rows, f) fp32, to which the final state of each document that ends here is added.
        norms: (documents, programs) fp32, receives the squared norm of each program's tile of these states.
    """
    rows, f = a.shape[1], z.shape[1]
    tile = tile_of(rows, f)
    first, last = window[0], window[-1] + 1
    made = schedule.readers[last] - schedule.readers[first]
    start = before
    if before is None and base is None:  # from constant zeros ptxas serialises the products (C7515)
        start = total if total is not None else after
    _chunk_weights_kernel[(tile.number(rows, f),)](
        _descriptor(a, BLOCK_T, tile.rows),
        _descriptor(z, BLOCK_T, tile.columns),
        _descriptor(out, 1, *_piece(tile, schedule.steps_per_chunk)),
        schedule.table,
        schedule.tokens,
        base,
        start,
        after,
        total,
        norms,
        rows,
        f,
        *(0 if tensor is None else tensor.stride(0) for tensor in (base, start, after, total)),
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
        CONTINUES=CONTINUES,
        BLOCK_ROWS=tile.rows,
        BLOCK_F=tile.columns,
        BLOCK_T=BLOCK_T,
        STAGES=STAGES,
        num_warps=tile.warps,
    )


def _piece(tile: Tile, steps: int) -> tuple[int, int]:
    """Return (rows, columns) of the pieces of a tile; one piece is stored before each of ``steps`` steps."""
    across = tile.columns // PIECE_F
    if steps < across:
        return tile.rows, tile.columns
    down = 2 ** ((steps // across).bit_length() - 1)
    return max(tile.rows // down, LEAST_PIECE_ROWS), PIECE_F


def tile_of(rows: int, f: int) -> Tile:
    """Return the tiles in which a state (rows, f) is scanned."""
    return SMALL if LARGE.number(rows, f) <= FEW_TILES else LARGE


def programs(rows: int, f: int) -> int:
    """Return the number of CTAs: one per tile of a state (rows, f)."""
    return tile_of(rows, f).number(rows, f)


def unsupported_reason(z: Tensor, d: int, chunk_size: int, eta: float) -> str | None:
    """Return the reason why the kernel does not support these operands, or None."""
    if torch.cuda.get_device_capability(z.device)[0] != 9:
        return f"{torch.cuda.get_device_name(z.device)} is not a Hopper GPU"
    if z.dtype != torch.bfloat16:
        return f"operands are {z.dtype}, not bfloat16"
    if chunk_size % CHUNK_MULTIPLE:
        return f"chunk_size={chunk_size} is not a multiple of {CHUNK_MULTIPLE}"
    for name, size in (("f", z.shape[2]), ("d", d)):
        if size % 64:
            return f"{name}={size} is not a multiple of 64"
    if eta == 0:
        return "eta=0"
    return None


class HopperBackend:
    """Scan with the Hopper kernel (see ``Backend``)."""

    name = "hopper"
    window_bytes = WINDOW_BYTES
    exchange_window_bytes = EXCHANGE_WINDOW_BYTES
    keeps_by_default = True
    needs_alignment = True

    def scan(
        self,
        segments: Sequence[Segment],
        base: Tensor | None,
        a: Tensor,
        z: Tensor,
        step: ScanStep,
        pool: WindowPool,
        *,
        carry_in: Tensor | None = None,
        carry_out: Tensor | None = None,
        total: Tensor | None = None,
        norms: Tensor | None = None,
        max_window_bytes: int | None = None,
        out: Tensor | None = None,
    ) -> Iterator[Window]:
        """Scan segments (see ``Backend.scan``). A window holds as many chunks as fit in ``max_window_bytes``."""
        schedule = make_schedule(
            tuple(segments),
            BLOCK_T,
            has_base=base is not None,
            has_carry=carry_in is not None,
            carry_out_wanted=carry_out is not None,
            totals_wanted=total is not None or norms is not None,
            stream=torch.cuda.current_stream(z.device) if z.is_cuda else None,
        )
        rows, f = a.shape[1], z.shape[1]
        limit = self.window_bytes if max_window_bytes is None else max_window_bytes
        most = len(schedule.chunks) if out is not None else max(1, limit // (2 * rows * f))
        tile_norms = None
        if norms is not None:
            tile_norms = torch.empty(schedule.documents, programs(rows, f), dtype=torch.float32, device=z.device)
        between = None  # the state between two windows of a document
        before = carry_in
        for window in schedule.windows(most):
            after = carry_out if window.stop == len(schedule.chunks) else None
            if schedule.continues[window[-1]]:
                if between is None:
                    between = torch.empty(rows, f, dtype=torch.float32, device=z.device)
                after = between
            reading = schedule.reading_chunks(window)
            weights = out
            if out is None:
                pool.release()
                weights = pool.take((max(len(reading), 1), rows, f), z)  # a TMA descriptor needs memory
            chunk_weights(
                a, z, schedule, window, weights,
                scale=step.scale, base=base, before=before, after=after, total=total, norms=tile_norms,
            )  # fmt: skip
            before = after
            if reading:
                yield Window(reading, weights[: len(reading)])
        if norms is not None:
            torch.sum(tile_norms, 1, out=norms)
