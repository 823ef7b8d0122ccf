"""Hold the state of documents between two calls: the sum of updates, and the tokens of the unfinished chunk."""

from typing import NamedTuple

import torch
from torch import Tensor

from inplace_ttt.ttt.products import state_dtype


class FastWeightState(NamedTuple):
    """Hold the state of ``fast_weight_linear`` after a sequence. Continuing from it equals one call on all tokens.

    The next tokens use ``weight + updates``. An unfinished chunk does not change the weight until it is complete, so
    its z and v are stored as given, without eta and clipping.
    """

    updates: Tensor  # (b, d, f), the sum of the updates of complete chunks; fp32, or fp64 for fp64 operands
    z: Tensor  # (t, b, f), the unfinished chunk's inputs of the down-projection, t < chunk_size
    v: Tensor  # (t, b, d), the unfinished chunk's targets

    @property
    def unfinished(self) -> int:
        """Return the number of tokens in the unfinished chunk."""
        return self.z.shape[0]


def check_state(state: FastWeightState, z: Tensor, d: int, chunk_size: int) -> None:
    """Raise ValueError if a state does not fit operands z (s, b, f), targets (s, b, d) and the chunk size."""
    _, b, f = z.shape
    updates, pending_z, pending_v = state
    expected = state_dtype(z.dtype)
    if updates.shape != (b, d, f) or updates.dtype != expected:
        raise ValueError(
            f"initial_state.updates is {tuple(updates.shape)} {updates.dtype}: "
            f"these operands need {(b, d, f)} {expected}"
        )
    t = pending_z.shape[0]
    if pending_z.shape[1:] != (b, f) or pending_v.shape != (t, b, d):
        raise ValueError(
            f"initial_state.z {tuple(pending_z.shape)} and initial_state.v {tuple(pending_v.shape)} do not fit: "
            f"expected (t, {b}, {f}) and (t, {b}, {d})"
        )
    if t >= chunk_size:
        raise ValueError(
            f"initial_state holds {t} tokens of an unfinished chunk, but chunk_size={chunk_size}: "
            f"use the chunk_size with which the state was made"
        )
    if not pending_z.dtype == pending_v.dtype == z.dtype:
        raise ValueError(
            f"initial_state.z is {pending_z.dtype} and initial_state.v is {pending_v.dtype}: "
            f"both must be {z.dtype}, the dtype of z and v"
        )


def zero_state(z: Tensor, d: int) -> FastWeightState:
    """Return the state at the start of a document, for z (s, b, f) and targets of size d."""
    _, b, f = z.shape
    updates = torch.zeros(b, d, f, dtype=state_dtype(z.dtype), device=z.device)
    return FastWeightState(updates, z.new_empty(0, b, f), z.new_empty(0, b, d))
