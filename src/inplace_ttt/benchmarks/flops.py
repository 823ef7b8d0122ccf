"""Floating-point operations of a model, as the field counts them: a multiply and an add are two."""

from inplace_ttt.config import Config, ttt_layers


def training_flops_per_sequence(config: Config) -> float:
    """Forward and backward of one sequence; causal attention counted once, nothing for recompute.

    The backward is twice the forward everywhere but in what fast weights add: update and its gradients are three
    products of s d f, and the projection of the targets three of s d d.
    """
    model, s = config.model, config.data.seq_length
    d, f, heads = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads * model.kv_channels
    groups = model.num_query_groups * model.kv_channels
    projections = 2 * s * d * (2 * heads + 2 * groups)
    seen = s if model.sliding_window is None else min(s, 2 * model.sliding_window)
    attention = 2 * 2 * s * (seen / 2) * heads
    mlp = 3 * 2 * s * d * f
    logits = 2 * s * d * (model.vocab_size or 0)
    fast = len(ttt_layers(config.ttt, model.num_layers)) * 2 * s * d * (f + (d if config.ttt.project else 0))
    return 3 * (model.num_layers * (projections + attention + mlp) + logits + fast)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by name, as its maker states it; None: not known here."""
    for name, peak in (("H100", 989e12), ("H200", 989e12), ("GH200", 989e12), ("A100", 312e12), ("B200", 2250e12)):
        if name in device_name:
            return peak
    return None
