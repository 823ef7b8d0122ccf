"""Scan in plain torch, as the reference: one chunk at a time, for every device, dtype and shape.

The weight is constant inside a chunk, so one matrix product serves all its tokens. Between chunks one state is updated
in place. A scan holds the state and one chunk's weight, independent of the sequence length.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inplace_ttt.ttt.plan import Segment
from inplace_ttt.ttt.products import state_dtype
from inplace_ttt.ttt.rule import ScanStep
from inplace_ttt.ttt.window import Window, WindowPool


class TorchBackend:
    """Scan with torch matrix products (see ``Backend``)."""

    name = "torch"
    window_bytes = 0
    exchange_window_bytes = 0
    keeps_by_default = False
    needs_alignment = False

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
        """Scan segments (see ``Backend.scan``). Without ``out`` a window holds one chunk."""
        rows, f = a.shape[1], z.shape[1]
        state = torch.empty(rows, f, dtype=state_dtype(z.dtype), device=z.device)
        ended, filled, read = 0, 0, []
        for place, segment in enumerate(segments):
            is_zero = place > 0 or carry_in is None
            state.zero_() if is_zero else state.copy_(carry_in)
            to_the_end = carry_out is not None if segment.sends else (total is not None or norms is not None)
            for number, chunk in enumerate(segment.chunks):
                is_last = number == len(segment.chunks) - 1
                unfinished_suffix = number == 0 and not segment.first_reads
                if not unfinished_suffix and not (is_zero and base is None):
                    if out is None:
                        pool.release()
                        memory = pool.take((1, rows, f), z)
                    else:
                        memory = out[filled : filled + 1]
                        filled += 1
                        read.append((chunk, memory))
                    _write_weight(base, None if is_zero else state, memory[0])
                    if out is None:
                        yield Window((chunk,), memory)
                if not is_last or (segment.last_writes and to_the_end):
                    tokens = slice(*chunk)
                    step(state, a[tokens], z[tokens])
                    is_zero = False
            if segment.sends:
                if carry_out is not None:
                    carry_out.copy_(state)
                continue
            if total is not None:
                total.add_(state)
            if norms is not None:
                norms[ended] = torch.linalg.vector_norm(state).square()
            ended += 1
        if read:
            if read[-1][0] < read[0][0]:  # a window is in token order
                out[:filled] = out[:filled].flip(0)
            yield Window(tuple(sorted(chunk for chunk, _ in read)), out[:filled])


def _write_weight(base: Tensor | None, state: Tensor | None, out: Tensor) -> None:
    """Write base + state, each (rows, f) or None for zero, to out, with one rounding."""
    if base is None or state is None:
        out.copy_(state if base is None else base)
    else:
        torch.add(base, state, out=out)
