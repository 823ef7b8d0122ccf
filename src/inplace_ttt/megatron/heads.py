"""Make the heads of self-attention from the QKV projection: split, QK-norm, rotary position embedding (RoPE)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inplace_ttt.megatron import kernels


def make_heads(
    qkv: Tensor,  # (s, b, (heads + 2 groups) * channels)
    table: Tensor | None,  # (s, 1, 1, channels) fp32, cosines and sines of ``rope.RotaryEmbedding``; None: no RoPE
    query_weight: Tensor | None,  # (channels,) of the RMSNorm of each query and each key; None: no QK-norm
    key_weight: Tensor | None,
    *,
    groups: int,
    channels: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query (s, b, heads, channels), key and value (s, b, groups, channels).

    The projection has, for each group, its queries, its key and its value. RoPE (Su et al., arXiv 2104.09864) rotates
    the pairs (c, c + channels / 2), as in Hugging Face's models.
    """
    if kernels.fits(qkv):
        return _Heads.apply(qkv, table, query_weight, key_weight, groups, channels, eps)
    each = qkv.shape[-1] // channels // groups - 2
    parts = qkv.view(*qkv.shape[:2], groups, each + 2, channels)
    query, key, value = parts[..., :each, :].flatten(2, 3), parts[..., each, :], parts[..., each + 1, :]
    if query_weight is not None:
        query = F.rms_norm(query, (channels,), query_weight, eps)
        key = F.rms_norm(key, (channels,), key_weight, eps)
    if table is not None:
        query, key = _rotate(query, table), _rotate(key, table)
    return query, key, value


def _rotate(heads: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.to(heads.dtype).chunk(2, dim=-1)
    low, high = heads.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, table, query_weight, key_weight, groups, channels, eps):
        """Return query, key and value; arguments as those of ``make_heads``."""
        from inplace_ttt.megatron.kernels import heads

        qkv = qkv.contiguous()
        weights = None if query_weight is None else torch.stack((query_weight, key_weight)).float()
        ctx.save_for_backward(None if weights is None else qkv, weights, table)
        ctx.eps, ctx.dtype = eps, None if weights is None else query_weight.dtype
        return heads.make_heads(qkv, table, weights, groups, channels, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        """Return the gradients of qkv and of the norms' weights."""
        from inplace_ttt.megatron.kernels import heads

        qkv, weights, table = ctx.saved_tensors
        gradients = tuple(one.contiguous() for one in gradients)
        dqkv, dweights = heads.make_heads_backward(qkv, table, weights, gradients, ctx.eps)
        dquery, dkey = (None, None) if dweights is None else dweights.to(ctx.dtype)
        return dqkv, None, dquery, dkey, None, None, None
