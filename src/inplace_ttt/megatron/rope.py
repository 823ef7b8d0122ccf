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
    """Compute the cosines and sines of positions, for ``heads.make_heads``."""

    def __init__(self, inv_freq: Tensor):
        super().__init__()
        self.inv_freq = inv_freq.float()  # not a buffer: a model in bf16 would round it

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return the kv_channels / 2 cosines, and then as many sines, of each position: (s, 1, 1, kv_channels) fp32.

        Args:
            position_ids: (b, s), the same in all rows.
        """
        if self.inv_freq.device != position_ids.device:
            self.inv_freq = self.inv_freq.to(position_ids.device)
        angles = torch.outer(position_ids[0].float(), self.inv_freq)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)[:, None, None, :]
