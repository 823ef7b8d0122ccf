"""Multiply a batch of vectors with each request's own update."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS, COLUMNS = 16, 512  # block of an update that a program holds


def add_updates(out: Tensor, updates: Tensor, slots: Tensor, z: Tensor) -> None:
    """Add ``updates[slots[b]] @ z[b]`` to ``out[b]``, for each b. Each update is read once.

    The last slot is all zeros: nothing is read for it.

    Args:
        out: (b, d), changed in place.
        updates: (slots, d, f), of any of the dtypes of z or fp32.
        slots: (b,) int64 on the device of the updates.
        z: (b, f).
    """
    if z.is_cuda:
        _launch(out, updates, slots, z)
    else:
        out += torch.bmm(updates[slots].to(z.dtype), z[:, :, None])[:, :, 0].to(out.dtype)


def _launch(out: Tensor, updates: Tensor, slots: Tensor, z: Tensor) -> None:
    (b, d), f = out.shape, z.shape[1]
    grid = (b, triton.cdiv(d, ROWS))
    _add_updates[grid](
        out, updates, slots, z, d, len(updates) - 1, out.stride(0), updates.stride(0), updates.stride(1), z.stride(0),
        f=f, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _add_updates(
        out, updates, slots, z, d, last, out_stride, slot_stride, row_stride, z_stride,
        f: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        number, block = tl.program_id(0), tl.program_id(1)
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = rows < d
        slot = tl.load(slots + number).to(tl.int64)
        if slot == last:
            return
        own = updates + slot * slot_stride
        total = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, f, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            mask = columns < f
            vector = tl.load(z + number * z_stride + columns, mask=mask, other=0.0).to(tl.float32)
            matrix = tl.load(
                own + rows[:, None] * row_stride + columns[None, :], mask=inside[:, None] & mask[None, :], other=0.0
            ).to(tl.float32)
            total += tl.sum(matrix * vector[None, :], axis=1)
        place = out + number * out_stride + rows
        tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)
