"""Describe Qwen2 and Qwen2.5 (dense): biases for queries, keys and values, sliding windows."""

from inplace_ttt.models.family import Family
from inplace_ttt.models.mapping import QKV, ParamMapping

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    config_class="Qwen2Config",
    megatron=dict(add_qkv_bias=True),
    rows=(
        ParamMapping(
            "self_attention.linear_qkv.bias",
            {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "k", "self_attn.v_proj.bias": "k"},
            QKV,
        ),
    ),
    has_windows=True,
)
