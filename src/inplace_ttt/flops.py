"""Count the floating-point operations of a model; a multiply-add counts as two."""

from dataclasses import dataclass

from inplace_ttt.config import Config, Model, linear_attention_sizes, ttt_layers

# Dense bf16 peak in FLOP/s, by a part of the device name; more specific names come first
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H200 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("B200", 2250e12),
)


@dataclass(frozen=True)
class Flops:
    """Hold the FLOPs of the forward of one sequence, by part."""

    layers: float  # matrix products with the layers' weights
    attention: float  # causal attention: half of the full score matrix; or the recurrence of linear attention
    logits: float  # output layer
    fast: float  # fast weights: updates and target projection

    @property
    def training(self) -> float:
        """Return the FLOPs of forward and backward, without recompute.

        The backward is twice the forward for every part: an update and its gradients are three products of s d f, and
        the target projection and its gradients three products of s d d.
        """
        return 3 * (self.layers + self.attention + self.logits + self.fast)


def full_attention_layers(model: Model) -> int:
    """Return the number of layers with full attention."""
    if model.sliding_window is None:
        return model.num_layers
    return 0 if model.window_attn_skip_freq is None else model.num_layers // model.window_attn_skip_freq


def forward_flops(config: Config) -> Flops:
    """Return the FLOPs of the forward of one sequence of data.seq_length tokens, on all GPUs together."""
    model, s = config.model, config.data.seq_length
    d, f, heads = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads * model.kv_channels
    groups = model.num_query_groups * model.kv_channels
    fast = len(ttt_layers(config.ttt, model.num_layers)) * 2 * s * d * (f + (d if config.ttt.project else 0))
    full = full_attention_layers(model)
    linear = linear_attention_sizes(model)
    if linear is not None:
        return Flops(
            layers=model.num_layers * 2 * s * d * (linear.inputs + linear.heads * linear.value_dim + 3 * f),
            attention=model.num_layers * linear.state_flops(s),
            logits=2 * s * d * (model.vocab_size or 0),
            fast=fast,
        )
    seen = full * s + (model.num_layers - full) * min(s, 2 * (model.sliding_window or s))
    return Flops(
        layers=model.num_layers * (2 * s * d * (2 * heads + 2 * groups) + 3 * 2 * s * d * f),
        attention=2 * 2 * s * (seen / 2) * heads,
        logits=2 * s * d * (model.vocab_size or 0),
        fast=fast,
    )


def peak_flops(device_name: str) -> float | None:
    """Return the vendor's dense bf16 peak of a device in FLOP/s, or None if the name is not known."""
    return next((peak for name, peak in PEAKS if name in device_name), None)
