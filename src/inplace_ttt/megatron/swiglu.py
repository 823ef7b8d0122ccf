"""Compute the gated product of the MLP, SwiGLU (Shazeer, arXiv 2002.05202)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inplace_ttt.megatron import kernels


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Return silu(gate) * up, (..., f), of gate and up side by side, (..., 2 f)."""
    if kernels.fits(gate_and_up):
        return _SwiGLU.apply(gate_and_up)
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        """Return the product (..., f) of x (..., 2 f)."""
        from inplace_ttt.megatron.kernels import swiglu

        x = x.contiguous()
        ctx.save_for_backward(x)
        y = swiglu.swiglu(x.view(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """Return the gradient of x (..., 2 f), given that of the product."""
        from inplace_ttt.megatron.kernels import swiglu

        (x,) = ctx.saved_tensors
        dx = swiglu.swiglu_backward(x.view(-1, x.shape[-1]), dy.contiguous().view(-1, dy.shape[-1]))
        return dx.view(x.shape)
