"""Small exported models of every kind."""

import torch

import hf_models
from inplace_ttt.hf import modeling_inplace_ttt as exported

CHUNK = 16
SMALL = hf_models.SMALL | dict(ttt_layers=[0, 2], ttt_chunk=CHUNK, ttt_lr=0.05)
QWEN3, LLAMA = exported.InPlaceTTTQwen3ForCausalLM, exported.InPlaceTTTLlamaForCausalLM
WINDOWS = ["sliding_attention", "full_attention"] * 2
VARIANTS = {
    "qwen3": (QWEN3, dict(head_dim=16)),
    "llama": (LLAMA, {}),
    "qwen2": (exported.InPlaceTTTQwen2ForCausalLM, {}),
    "input_embed, no projection": (QWEN3, dict(head_dim=16, ttt_target="input_embed", ttt_proj=False)),
    "odd kernel": (QWEN3, dict(head_dim=8, ttt_conv_kernel=3)),
    "sliding window": (QWEN3, dict(head_dim=16, use_sliding_window=True, sliding_window=9, max_window_layers=0)),
    "clipped": (QWEN3, dict(head_dim=16, ttt_clip=0.5)),
    "bounded": (QWEN3, dict(head_dim=16, ttt_clip=0.5, ttt_bound=0.5, ttt_trained_length=2 * CHUNK + 3)),
    "windows": (QWEN3, dict(head_dim=16, use_sliding_window=True, sliding_window=9, layer_types=WINDOWS)),
}


def build(variant):
    torch.manual_seed(0)
    kind, changes = VARIANTS[variant]
    model = kind(kind.config_class(**SMALL, **changes)).eval()
    for name, parameter in model.named_parameters():
        if "ttt" in name or "bias" in name:
            parameter.data.normal_(0, 0.3)
    model.generation_config.eos_token_id = None  # answers have the length that is asked for
    return model


def texts(batch, length, seed=0):
    return torch.randint(0, 199, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(value, reference):
    return (value - reference).abs().max() <= 1e-5 * reference.abs().max() + 1e-5
