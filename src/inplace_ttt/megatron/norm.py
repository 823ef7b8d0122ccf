"""Provide RMSNorm (Zhang and Sennrich, arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inplace_ttt.megatron import kernels


class RMSNorm(nn.RMSNorm):
    """Provide RMSNorm with Megatron's interface and, unlike Megatron's wrapper, with sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # with sequence parallelism each rank processes some of the tokens: Megatron then sums the gradients
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed tensor, like x (..., hidden_size)."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight. The mean is over the last dimension (n); weight is (n,)."""
    if kernels.fits(x, weight):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        """Return the normed tensor, like x (..., n), given weight (n,)."""
        from inplace_ttt.megatron.kernels import norm

        rows = x.contiguous()
        y, scales = norm.rms_norm(rows.view(-1, weight.shape[0]), weight, eps)
        ctx.save_for_backward(rows, weight, scales)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """Return the gradients of x (..., n) and weight (n,), given that of the normed tensor."""
        from inplace_ttt.megatron.kernels import norm

        x, weight, scales = ctx.saved_tensors
        n = weight.shape[0]
        dx, dweight = norm.rms_norm_backward(x.view(-1, n), weight, scales, dy.contiguous().view(-1, n))
        return dx.view(dy.shape), dweight, None
