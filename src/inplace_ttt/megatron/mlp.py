"""Implement the TTT-MLP: a gated MLP whose down-projection is a fast weight (Feng et al., arXiv 2604.06169, section 3).

Communication:
    tensor parallel     fc1 splits f, so the state is (d, f / TP) and every rank needs the full targets v. The output
                        is a partial sum over f, and so is dL/dv: both are summed over the group.
    sequence parallel   each rank computes the targets of its own tokens; then they are all-gathered.
    context parallel    fast_weight_linear exchanges carries (states at the edges of slices).
"""

import itertools

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from inplace_ttt.config import TTT
from inplace_ttt.megatron.batch_context import BatchContext
from inplace_ttt.megatron.recompute import recomputed
from inplace_ttt.megatron.swiglu import swiglu
from inplace_ttt.ttt import (
    PAPER_RULE,
    CarryCache,
    ChunkTargets,
    DecayedSum,
    UpdateRule,
    bounded_fast_weight_linear,
    fast_weight_linear,
    histogram,
    is_papers,
)
from inplace_ttt.ttt.bounded import BoundedSum
from inplace_ttt.ttt.layout import SequenceLayout, take_local
from inplace_ttt.ttt.products import state_dtype
from inplace_ttt.ttt.target import chunk_target

COMM_DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # None: dtype of the sums of updates


def update_rule(ttt: TTT) -> UpdateRule:
    """Return the update rule of a configuration."""
    return PAPER_RULE if ttt.decay == 1 else DecayedSum(ttt.decay)


class _Weight(nn.Module):
    """Hold one parameter with the name it has in the authors' checkpoints: ``ttt_conv.weight``, ``ttt_proj.weight``."""

    def __init__(self, *shape: int, config, tp_group):
        super().__init__()
        self.tp_group = tp_group
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        self.weight.is_ttt = True  # for ttt.lr_multiplier and ttt.clip_separately
        # Replicated over the group, while each rank processes some of the tokens: Megatron then sums the gradients
        self.weight.sequence_parallel = config.sequence_parallel

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Return the weight's entry for Megatron's checkpoint; see MegatronModule for the arguments."""
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {},  # replicated over tensor-parallel ranks
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class GatedMLP(MLP):
    """Provide Megatron's gated MLP, whose product can be recomputed in the backward."""

    recomputes_activation = False  # True: the backward computes the gated product again, from the output of linear_fc1

    def forward(self, hidden_states: Tensor, **_) -> tuple[Tensor, Tensor | None]:
        """Return the output, with the shape of hidden_states (s, b, d), and linear_fc2's bias or None."""
        return self.linear_fc2(self._activated(hidden_states))

    def _activated(self, hidden_states: Tensor) -> Tensor:
        """Return the gated product (s, b, f / TP), the input of the down-projection."""
        gate_and_up = self.linear_fc1(hidden_states)[0]
        if self.recomputes_activation:
            return recomputed(swiglu, gate_and_up)
        return swiglu(gate_and_up)


class TTTMLP(GatedMLP):
    """Extend the gated MLP: the weight of ``linear_fc2`` is a fast weight."""

    def __init__(self, config, submodules: MLPSubmodules, ttt: TTT, *, pg_collection):
        super().__init__(
            config=config, submodules=submodules, tp_group=pg_collection.tp, ffn_hidden_size=config.ffn_hidden_size
        )
        self.ttt, self.cp_group = ttt, pg_collection.cp
        self.rule = update_rule(ttt)
        self.clip = ttt.clip  # an evaluation may change it
        self.bound: tuple[float, int] | None = None  # evaluation only: (bound, trained_chunks) of ttt/bounded.py
        d, common = config.hidden_size, dict(config=config, tp_group=pg_collection.tp)
        self.ttt_conv = _Weight(d, 1, ttt.conv_kernel, **common)
        self.ttt_conv.weight.requires_grad_(ttt.convolution)
        self.ttt_proj = _Weight(d, d, **common) if ttt.project else None
        # Number of layers whose saved chunk weights are alive at once without recompute, times the micro batches in
        # flight in the pipeline
        self.kept_layers = 1
        self.is_plain = False  # True: forwards do not use the fast weights, as a control in evaluation
        # Largest squared norm of a document's sum of updates since the last reset, over all tensor-parallel shards
        self.max_update_norm = torch.zeros((), device=self.linear_fc2.weight.device)
        # True: forwards add the norms of the chunks' updates to a histogram (ttt/histogram.py)
        self.counts_updates = False
        self.update_counts = torch.zeros(histogram.BINS, dtype=torch.int64, device=self.linear_fc2.weight.device)

    def forward(
        self,
        hidden_states: Tensor,  # (s, b, d); with sequence parallelism this rank's s / TP tokens
        input_embed: Tensor | None,  # embedding output, same shape
        batch_context: BatchContext,
    ) -> tuple[Tensor, None]:
        """Return the output, with the shape of hidden_states, and None for Megatron's bias."""
        if self.is_plain:
            return super().forward(hidden_states)
        layout = batch_context.layout
        z = self._activated(hidden_states)
        u = input_embed if self.ttt.target == "input_embed" else hidden_states
        if self.bound is not None:
            return self._reduce(self._bounded(z, self._targets(u, layout))), None
        cache, is_recompute = self._carry_cache(batch_context)
        notes_norms = self.training and not is_recompute
        counts = notes_norms and self.counts_updates and is_papers(self.rule)
        out = fast_weight_linear(
            z,
            self._targets(u, layout),
            self.linear_fc2.weight,
            eta=self.ttt.eta,
            chunk_size=self.ttt.chunk_size,
            cu_seqlens=layout.cu_seqlens,
            cp_group=self.cp_group,
            plan=layout.plan,
            clip=self.clip,
            rule=self.rule,
            tp_group=self.tp_group,
            comm_dtype=COMM_DTYPES[self.ttt.comm_dtype],
            prefix=self.ttt.prefix,
            keep_chunk_weights=self.ttt.keep_chunk_weights,
            kept_layers=1 if is_recompute else self.kept_layers,
            carry_cache=cache,
            return_update_norms=notes_norms,
            return_update_ratios=counts,
        )
        if notes_norms:
            out, norms, *ratios = out
            self._note_norms(norms)
            if counts:
                self.update_counts += histogram.count(ratios[0])
        return self._reduce(out), None

    def _bounded(self, z: Tensor, v: Tensor | ChunkTargets, **more) -> Tensor | tuple[Tensor, BoundedSum]:
        """Apply the fast weights to one document per row, which may be longer than the training length."""
        bound, trained_chunks = self.bound
        return bounded_fast_weight_linear(
            z,
            v,
            self.linear_fc2.weight,
            bound=bound,
            trained_chunks=trained_chunks,
            eta=self.ttt.eta,
            chunk_size=self.ttt.chunk_size,
            clip=self.clip,
            rule=self.rule,
            tp_group=self.tp_group,
            cp_group=self.cp_group,
            **more,
        )

    def _reduce(self, out: Tensor) -> Tensor:
        """Sum the partial outputs over the tensor-parallel ranks. The result has the shape of hidden_states."""
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(out, group=self.tp_group)

    @torch.no_grad()
    def sum_of_updates(self, hidden_states: Tensor, input_embed: Tensor | None, tokens: int) -> BoundedSum:
        """Return this rank's part of the sum of updates after the first tokens of the sequence.

        The sum over the context-parallel ranks is (1, d, f / TP); its limit is inf without ``bound``. Does not support
        sequence parallelism.

        Args:
            hidden_states, input_embed: (s, 1, d), inputs of ``forward``; slices start and end with chunks.
            tokens: number of tokens of the sequence, in complete chunks.
        """
        weight, cp = self.linear_fc2.weight, self.cp_group
        z = self._activated(hidden_states)
        u = input_embed if self.ttt.target == "input_embed" else hidden_states
        if self.bound is not None and tokens:
            return self._bounded(z, self._chunk_targets(u), sum_at=tokens)[1]
        places = take_local(torch.arange(len(z) * cp.size()), cp.size(), cp.rank(), dim=0)
        inside = (places < tokens).nonzero().squeeze(1).to(z.device)
        nothing = torch.zeros(1, *weight.shape, dtype=state_dtype(weight.dtype), device=weight.device)
        limits = nothing.new_full((1,), torch.inf if cp.rank() == 0 else 0.0)
        if not len(inside):
            return BoundedSum(nothing, limits)
        _, state = fast_weight_linear(
            z[inside],
            self._chunk_targets(u[inside]),
            weight,
            eta=self.ttt.eta,
            chunk_size=self.ttt.chunk_size,
            clip=self.clip,
            rule=self.rule,
            tp_group=self.tp_group,
            output_final_state=True,
        )
        return BoundedSum(state.updates, limits)

    def _chunk_targets(self, u: Tensor) -> ChunkTargets:
        """Return the targets of complete chunks, (s, 1, d)."""
        ids = torch.arange(len(u), dtype=torch.int32, device=u.device) // self.ttt.chunk_size
        return ChunkTargets(u, self.ttt_conv.weight, None if self.ttt_proj is None else self.ttt_proj.weight, ids)

    def _carry_cache(self, batch_context: BatchContext) -> tuple[CarryCache | None, bool]:
        """Return (cache of incoming carries, whether this forward is a recompute).

        A forward that will be recomputed runs without gradients and fills the cache. Its recompute runs with gradients
        and the same context, and reads the cache. (None, False): neither.
        """
        if not self.training:
            return None, False
        if torch.is_grad_enabled():
            cache = batch_context.recompute.pop(self, None)
            return cache, cache is not None
        cache = batch_context.recompute[self] = CarryCache()
        return cache, False

    def _targets(self, u: Tensor, layout: SequenceLayout) -> Tensor | ChunkTargets:
        """Return the targets (s, b, d) of all local tokens. ``u`` has the shape of hidden_states."""
        plan, ids, kernel = layout.plan, layout.chunk_ids, self.ttt_conv.weight
        projection = None if self.ttt_proj is None else self.ttt_proj.weight
        if not self.config.sequence_parallel:
            return ChunkTargets(u, kernel, projection, ids, tp_group=self.tp_group)
        size = u.shape[0]
        shard = slice(self.tp_group.rank() * size, (self.tp_group.rank() + 1) * size)
        starts = set(itertools.accumulate(plan.chunk_lengths, initial=0))
        if starts.issuperset(range(0, plan.local_length, size)):
            v = chunk_target(u, kernel, projection, ids[shard])
        else:  # a chunk spans two ranks: the convolution needs tokens of the neighbour
            c = chunk_target(gather_from_sequence_parallel_region(u, group=self.tp_group), kernel, None, ids)[shard]
            v = c if projection is None else c @ projection
        return gather_from_sequence_parallel_region(v, group=self.tp_group)

    @torch.no_grad()
    def _note_norms(self, norms: Tensor) -> None:
        """Sum squared norms over the tensor-parallel shards and update the largest one."""
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(norms, group=self.tp_group)
        if norms.numel():
            self.max_update_norm = torch.maximum(self.max_update_norm, norms.max().float())
