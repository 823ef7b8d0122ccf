"""Describe Qwen3 (dense): RMSNorm of queries and keys, head size 128, sliding windows."""

from inplace_ttt.models.family import Family
from inplace_ttt.models.mapping import DIRECT, ParamMapping

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    config_class="Qwen3Config",
    megatron=dict(qk_layernorm=True),
    rows=(
        ParamMapping("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "h"}, DIRECT),
        ParamMapping("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "h"}, DIRECT),
    ),
    fixed=dict(attention_bias=False),
    has_windows=True,
    head_dim=lambda hidden, heads: 128,
)
