"""Describe Llama 2 and 3, and models of the same architecture, such as SmolLM2."""

from inplace_ttt.models.family import Family

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    config_class="LlamaConfig",
    megatron={},
    fixed=dict(attention_bias=False, mlp_bias=False),
)
