"""Continue a TTT layer from a saved state.

``FastWeightState`` holds z and v of the unfinished chunk. A layer must save the MLP's inputs instead: the convolution
looks ahead inside the chunk, so the targets of the last tokens depend on tokens that are not yet known. The inputs are
also smaller: at Qwen3-4B's shapes and C = 1024, at most 5 MB per text instead of 25 MB.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt.ops import fast_weight_linear
from inplace_ttt.ttt.plan import make_plan
from inplace_ttt.ttt.products import state_dtype
from inplace_ttt.ttt.rule import PAPER_RULE, UpdateRule
from inplace_ttt.ttt.state import FastWeightState
from inplace_ttt.ttt.target import ChunkTargets, chunk_ids


class LayerState(NamedTuple):
    """Hold the sum of updates of one layer, and the MLP's inputs of the unfinished chunk."""

    updates: Tensor  # (b, d, f), the sum of the updates of complete chunks; fp32, or fp64 for fp64 weights
    inputs: Tensor  # (t, b, d), the MLP's inputs of the unfinished chunk, t < chunk_size
    embeddings: Tensor | None = None  # (t, b, d), the unfinished chunk's embeddings; None: targets use inputs

    @classmethod
    def empty(cls, weight: Tensor, b: int, with_embeddings: bool = False) -> "LayerState":
        """Return the state at the start of ``b`` texts, for a down-projection (d, f)."""
        updates = weight.new_zeros(b, *weight.shape, dtype=state_dtype(weight.dtype))
        nothing = weight.new_empty(0, b, weight.shape[0])
        return cls(updates, nothing, nothing if with_embeddings else None)


def continue_layer(
    x: Tensor,  # (s, b, d)
    weight: Tensor,  # (d, f)
    state: LayerState,
    *,
    down_input: Callable[[Tensor], Tensor],
    conv_weight: Tensor,  # (d, 1, kernel)
    projection: Tensor | None,  # (d, d)
    eta: float,
    chunk_size: int,
    embeddings: Tensor | None = None,  # (s, b, d)
    clip: float | None = None,
    rule: UpdateRule = PAPER_RULE,
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, LayerState]:
    """Run a TTT layer on the tokens after a state. Several calls on parts of a text equal one call on all of it.

    Args:
        x: (s, b, d), the MLP's inputs.
        weight: (d, f), the slow down-projection.
        state: the state after all earlier tokens.
        down_input: maps MLP inputs (t, b, d) to inputs of the down-projection (t, b, f), token by token.
        conv_weight, projection: (d, 1, kernel) and (d, d) or None, see ``ChunkTargets``.
        embeddings: (s, b, d), embeddings of the same tokens, if targets use them (``target: input_embed``).
        eta, chunk_size, clip, rule, tp_group, backend: see ``fast_weight_linear``.

    Returns:
        The layer's outputs (s, b, d) and the state after them.
    """
    pending = state.inputs.shape[0]
    inputs = torch.cat([state.inputs, x])
    read = inputs if embeddings is None else torch.cat([state.embeddings, embeddings])
    if len(inputs) < chunk_size:  # no chunk is completed
        weights = (weight + state.updates).to(weight.dtype)
        out = torch.einsum("sbf,bdf->sbd", down_input(x), weights)
        return out, LayerState(state.updates, inputs, None if embeddings is None else read)
    z = down_input(inputs)
    plan = make_plan(len(inputs), chunk_size)
    ids = chunk_ids(plan.chunk_lengths).to(x.device)
    nothing = FastWeightState(state.updates, z[:0], read[:0])
    out, final = fast_weight_linear(
        z,
        ChunkTargets(read, conv_weight, projection, ids),
        weight,
        eta=eta,
        chunk_size=chunk_size,
        initial_state=nothing,
        output_final_state=True,
        clip=clip,
        rule=rule,
        tp_group=tp_group,
        plan=plan,
        backend=backend,
    )
    complete = len(inputs) - final.unfinished
    kept = inputs[complete:].clone(), None if embeddings is None else read[complete:].clone()
    return out[pending:], LayerState(final.updates, *kept)
