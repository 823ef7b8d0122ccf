"""The state of a whole TTT layer between two calls, and a layer that reads on from it.

The operation's state holds z and v of the unfinished chunk. A layer must keep the MLP's inputs instead: the targets of
a chunk's last tokens depend on tokens that have not come yet, because the convolution reads ahead inside the chunk.
They are also smaller: at Qwen3-4B's shapes and C = 1024, at most 5 MB a text instead of 25.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from inplace_ttt.ttt.ops import fast_weight_linear
from inplace_ttt.ttt.plan import make_plan
from inplace_ttt.ttt.products import state_dtype
from inplace_ttt.ttt.state import FastWeightState
from inplace_ttt.ttt.target import ChunkTargets, chunk_ids


class LayerState(NamedTuple):
    """Hold what a text has written to a layer, and the tokens of its unfinished chunk."""

    updates: Tensor  # (b, d, f), the sum of the updates of complete chunks; fp32, or fp64 for fp64 weights
    inputs: Tensor  # (t, b, d), the MLP's inputs of the unfinished chunk, t < chunk_size
    embeddings: Tensor | None = None  # (t, b, d), its embeddings, where they are what targets are made of

    @classmethod
    def empty(cls, weight: Tensor, b: int, with_embeddings: bool = False) -> "LayerState":
        """Return the state of ``b`` texts that begin, for a down-projection (d, f)."""
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
    backend: str = "auto",
) -> tuple[Tensor, LayerState]:
    """Run a TTT layer on tokens that follow those of a state; reading in parts equals reading at once.

    Args:
        x: the MLP's inputs.
        weight: the slow down-projection.
        down_input: maps MLP inputs (t, b, d) to inputs of the down-projection (t, b, f), token by token.
        conv_weight, projection: of the targets, see ``ChunkTargets``.
        embeddings: of the same tokens, where targets are made of them (``target: input_embed``).
        eta, chunk_size, clip, backend: see ``fast_weight_linear``.

    Returns:
        The layer's outputs (s, b, d) and the state behind them.
    """
    pending = state.inputs.shape[0]
    inputs = torch.cat([state.inputs, x])
    read = inputs if embeddings is None else torch.cat([state.embeddings, embeddings])
    if len(inputs) < chunk_size:  # no chunk is completed: what pending tokens write is not known yet
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
        plan=plan,
        backend=backend,
    )
    complete = len(inputs) - final.unfinished
    kept = inputs[complete:].clone(), None if embeddings is None else read[complete:].clone()
    return out[pending:], LayerState(final.updates, *kept)
