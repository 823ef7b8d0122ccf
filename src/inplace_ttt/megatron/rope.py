"""Compute rotary position embeddings for given positions, with the frequencies of transformers for each scaling."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from inplace_ttt.config import Model


def rope_frequencies(model: Model, max_position_embeddings: int) -> tuple[Tensor, float]:
    """Return inverse frequencies (kv_channels / 2,) fp32 and the factor on cos and sin (YaRN's attention factor)."""
    scaling = {key: value for key, value in vars(model.rope_scaling).items() if value is not None}
    if model.rope_scaling.rope_type == "default":
        exponents = torch.arange(0, model.kv_channels, 2, dtype=torch.float32) / model.kv_channels
        return 1.0 / model.rotary_base**exponents, 1.0
    config = LlamaConfig(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        head_dim=model.kv_channels,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_theta": model.rotary_base, **scaling},
    )
    return ROPE_INIT_FUNCTIONS[model.rope_scaling.rope_type](config, torch.device("cpu"))


class RotaryEmbedding(nn.Module):
    """Compute the angles of positions in the shape that Megatron's attention expects."""

    def __init__(self, inv_freq: Tensor):
        super().__init__()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return angles (s, 1, 1, kv_channels) fp32 of positions (b, s). All rows must have the same positions."""
        angles = torch.outer(position_ids[0].float(), self.inv_freq.float())
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
