"""Compute causal attention within documents, on any device and with context parallelism, without Transformer Engine.

Keys and values are gathered from all context-parallel ranks (and their gradients reduce-scattered); queries stay local.

With ``train.recompute=full`` the core attention can be excluded from the recompute. At long context it is most of a
layer's work, and its saved tensors (queries, keys, values, output) are a fraction of a layer's activations.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from inplace_ttt.megatron.batch_context import BatchContext
from inplace_ttt.megatron.query_spans import query_spans
from inplace_ttt.ttt.layout import in_sequence_order


class DocumentAttention(MegatronModule):
    """Compute the core attention of a Megatron layer: softmax(q k^T) v over earlier tokens of the same document."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        self.cp_group = pg_collection.cp
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        windowed = is_layer_window_attention(
            config.window_size, getattr(config, "window_attn_skip_freq", None), layer_number
        )
        self.window = config.window_size[0] + 1 if windowed else None
        self.keep = getattr(config, "keep_core_attn", False)  # the recompute reuses the forward's attention

    def forward(
        self,
        query: Tensor,  # (s, b, heads, channels), s local
        key: Tensor,  # (s, b, groups, channels)
        value: Tensor,
        attention_mask=None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params: BatchContext | None = None,
    ) -> Tensor:  # (s, b, heads * channels)
        """Return the attention output; see ``attend``.

        With ``keep_core_attn`` the forward (without gradients) leaves its output and graph in the context, and the
        recompute (with gradients) takes them from there.
        """
        context = packed_seq_params
        if not (self.training and self.keep):
            return self.attend(query, key, value, context)
        if torch.is_grad_enabled():
            kept = context.recompute.pop(self, None)  # None: this layer is not recomputed
            return self.attend(query, key, value, context) if kept is None else _Kept.apply(query, key, value, kept)
        gradients: list[Tensor] = []
        with torch.enable_grad():
            out = self.attend(
                *_Inputs.apply(query.new_empty(0).requires_grad_(), query, key, value, gradients), context
            )
        context.recompute[self] = out, gradients
        return out.detach()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: BatchContext | None) -> Tensor:
        """Return (s, b, heads * channels) for local queries (s, b, heads, channels).

        Keys and values are local, (s, b, groups, channels). ``context`` holds the document bounds; None: each row is
        one document.
        """
        cp_size = self.cp_group.size()
        key, value = self.gather(key), self.gather(value)
        documents = context.documents if context is not None else None
        repeats = query.shape[2] // key.shape[2]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # (b, heads, s, channels)
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        outputs = []
        for span in query_spans(k.shape[2], documents, cp_size, self.cp_group.rank(), self.window):
            queries, keys = span.local.stop - span.local.start, span.keys.stop - span.keys.start
            outputs.append(
                F.scaled_dot_product_attention(
                    q[:, :, span.local],
                    k[:, :, span.keys],
                    v[:, :, span.keys],
                    scale=self.scale,
                    **_mask(queries, keys, self.window, q.device),
                )
            )
        out = torch.cat(outputs, dim=2)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def gather(self, tensor: Tensor) -> Tensor:
        """Gather local keys or values (s, b, ...) into those of the whole sequence (s * CP, b, ...), in token order."""
        if self.cp_group.size() == 1:
            return tensor
        gathered = gather_from_sequence_parallel_region(tensor, group=self.cp_group)
        return in_sequence_order(gathered, self.cp_group.size())

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Return an empty dict: the core attention has no parameters to write to a checkpoint."""
        return {}


class _Inputs(torch.autograd.Function):
    """Make tensors the inputs of a separate graph. The graph does not hold them; it holds only what its nodes save."""

    @staticmethod
    def forward(ctx, trigger: Tensor, query: Tensor, key: Tensor, value: Tensor, gradients: list[Tensor]):
        """Return views of query, key and value, at which the separate graph begins.

        Args:
            trigger: any tensor that requires a gradient, so that the views do too.
            gradients: empty list, to which the backward appends the gradients of the views.
        """
        ctx.gradients = gradients
        return query.view_as(query), key.view_as(key), value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        """Append the gradients of query, key and value to ``gradients``, and pass none of them on."""
        ctx.gradients += grads
        return None, None, None, None, None


class _Kept(torch.autograd.Function):
    """Return the attention output of an earlier forward with the same inputs; the backward runs its saved graph."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, kept: tuple[Tensor, list[Tensor]]) -> Tensor:
        """Return the attention output of the earlier forward, (s, b, heads * channels), without its graph.

        Args:
            kept: the output with its graph, and the list that receives the gradients of its ``_Inputs``.
        """
        ctx.kept = kept
        return kept[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """Return the gradients of query, key and value, from a backward through the kept graph, which frees it."""
        (out, gradients), ctx.kept = ctx.kept, None
        torch.autograd.backward(out, grad)
        return *gradients, None


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> dict:
    """Return the mask arguments of scaled_dot_product_attention. A query attends to no later key, and to no key outside
    its window."""
    if window is not None and keys > 1:
        return {"attn_mask": _window_mask(queries, keys, window, device)}
    if queries == keys:
        return {"is_causal": True}
    return {"attn_mask": causal_lower_right(queries, keys)}


@lru_cache(maxsize=16)
def _window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)
