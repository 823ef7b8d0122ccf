"""Compute self-attention: projections, heads (``heads.py``) and the core attention (``attention.py``)."""

from functools import partial

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from inplace_ttt.megatron.batch_context import BatchContext
from inplace_ttt.megatron.heads import make_heads
from inplace_ttt.megatron.recompute import recomputed


class DocumentSelfAttention(SelfAttention):
    """Provide Megatron's self-attention for training, whose heads can be recomputed in the backward."""

    recomputes_heads = False  # True: the backward computes the heads again, from the output of linear_qkv

    def forward(
        self,
        hidden_states: Tensor,  # (s, b, d)
        attention_mask=None,
        *,
        rotary_pos_emb: Tensor | None = None,  # (s, 1, 1, channels) of rope.RotaryEmbedding; None: no RoPE
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

    def _heads(self, qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return query (s, b, heads / TP, channels), key and value (s, b, groups / TP, channels)."""
        norms = self.q_layernorm, self.k_layernorm
        make = partial(
            make_heads,
            groups=self.num_query_groups_per_partition,
            channels=self.hidden_size_per_attention_head,
            eps=self.config.layernorm_epsilon,
        )
        weights = (None if norm is None else norm.weight for norm in norms)
        return recomputed(make, qkv, rope, *weights) if self.recomputes_heads else make(qkv, rope, *weights)
