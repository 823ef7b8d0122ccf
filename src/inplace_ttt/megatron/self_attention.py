"""Compute self-attention: projections, heads with QK-norm and RoPE, and the core attention of ``attention.py``."""

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from inplace_ttt.megatron.batch_context import BatchContext
from inplace_ttt.megatron.recompute import recompute_outputs, recomputed


class DocumentSelfAttention(SelfAttention):
    """Provide Megatron's self-attention for training, whose heads can be recomputed in the backward."""

    recomputes_heads = False

    def recompute_heads(self) -> None:
        """Make the backward compute the heads again, from the output of linear_qkv."""
        self.recomputes_heads = True
        for norm in (self.q_layernorm, self.k_layernorm):
            if norm is not None:
                recompute_outputs(norm)

    def forward(
        self,
        hidden_states: Tensor,  # (s, b, d)
        attention_mask=None,
        *,
        rotary_pos_emb: Tensor | None = None,  # angles (s, 1, 1, channels); None: no RoPE
        packed_seq_params: BatchContext | None = None,
        **_,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, with the shape of hidden_states, and linear_proj's bias or None."""
        qkv, _ = self.linear_qkv(hidden_states)
        query, key, value = self._heads(qkv, rotary_pos_emb)
        if self.checkpoint_core_attention and self.training:
            out = self._checkpointed_attention_forward(query, key, value, None, packed_seq_params=packed_seq_params)
        else:
            out = self.core_attention(
                query, key, value, None, attn_mask_type=self.attn_mask_type, packed_seq_params=packed_seq_params
            )
        return self.linear_proj(out)

    def _heads(self, qkv: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return query (s, b, heads / TP, channels), key and value (s, b, groups / TP, channels)."""
        again = recomputed if self.recomputes_heads else _call
        query, key, value = again(self._split, qkv)
        if self.recomputes_heads:
            # later functions would keep contiguous copies of these views of qkv
            query, key, value = (again(Tensor.contiguous, view) for view in (query, key, value))
        query = query if self.q_layernorm is None else self.q_layernorm(query)
        key = key if self.k_layernorm is None else self.k_layernorm(key)
        if angles is not None:
            query, key = again(self._rotate, query, angles), again(self._rotate, key, angles)
        return query, key, value

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (s, b, groups / TP * (heads per group + 2) * channels)."""
        groups, channels = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        queries = self.num_attention_heads_per_partition // groups * channels
        qkv = qkv.view(*qkv.shape[:2], groups, queries + 2 * channels)
        query, key, value = qkv.split([queries, channels, channels], dim=3)
        return query.reshape(*query.shape[:2], -1, channels), key, value

    def _rotate(self, heads: Tensor, angles: Tensor) -> Tensor:
        return apply_rotary_pos_emb(
            heads, angles, config=self.config, mscale=self._yarn_concentration_factor, cp_group=self.pg_collection.cp
        )


def _call(function, *inputs):
    return function(*inputs)
