"""Compute the sizes of linear attention (``model.attention=gated_delta_net``)."""

from typing import NamedTuple

from inplace_ttt.config.schema import Model


class LinearAttention(NamedTuple):
    """Hold the sizes of one layer's Gated DeltaNet."""

    heads: int
    key_dim: int  # of a head, also of its queries
    value_dim: int
    kernel: int = 4  # taps of the convolutions of queries, keys and values

    @property
    def inputs(self) -> int:
        """Return the outputs of the input projection: queries, keys, values, output gate, step size and decay."""
        return self.heads * (2 * self.key_dim + 2 * self.value_dim + 2)

    def parameters(self, d: int) -> int:
        """Return the number of parameters, the output norm's included, at hidden size ``d``."""
        convolutions = self.heads * (2 * self.key_dim + self.value_dim) * self.kernel
        decay = 2 * self.heads
        return d * self.inputs + convolutions + decay + self.value_dim + self.heads * self.value_dim * d

    def state_flops(self, tokens: int, chunk: int = 64) -> int:
        """Return the FLOPs of the recurrence over tokens in chunks, as fla-core's kernels compute it."""
        k, v = self.key_dim, self.value_dim
        inside = chunk * (3 * k + 2 * v)  # products of a chunk's keys, queries and values with one another
        return 2 * tokens * self.heads * (inside // 2 + 3 * k * v)  # and with the state: read twice, written once


def linear_attention_sizes(model: Model) -> LinearAttention | None:
    """Return the sizes of a model's linear attention; None: it has softmax attention."""
    if model.attention == "softmax":
        return None
    return LinearAttention(
        model.linear_num_heads or model.num_attention_heads,
        model.linear_key_head_dim or model.kv_channels,
        model.linear_value_head_dim or model.kv_channels,
    )
