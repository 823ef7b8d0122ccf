"""Targets: a depthwise convolution of the inputs inside each chunk, then a projection.

``c_t[e] = sum_k w[e, 0, k] * u_{t + k - kernel // 2}[e]`` over taps in t's own chunk, and ``v_t = c_t P``
(arXiv 2604.06169, section 3.3). A tap into another chunk would let the update of a chunk hold tokens from its future.
"""

import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from inplace_ttt.ttt.products import state_dtype


def chunk_ids(chunk_lengths: tuple[int, ...]) -> Tensor:
    """Return (s,) int32 on the CPU: for each token the number of its chunk, from ``Plan.chunk_lengths``."""
    lengths = torch.tensor(chunk_lengths)
    return torch.repeat_interleave(torch.arange(len(chunk_lengths), dtype=torch.int32), lengths)


@dataclass(frozen=True)
class TargetRecipe:
    """Compute targets from (u, weight, projection or None), for any part of the tokens that whole chunks make up."""

    chunk_ids: Tensor  # (s,) integers; neighbouring tokens are in one chunk where theirs are equal
    tp_group: dist.ProcessGroup | None = None  # over which f is split: the gradient of v is summed over it

    def allocate(self, u: Tensor, *_: Tensor | None) -> Tensor:
        """Return memory for the targets of all tokens."""
        return torch.empty_like(u, memory_format=torch.contiguous_format)

    def write(self, v: Tensor, tokens: slice, u: Tensor, weight: Tensor, projection: Tensor | None) -> None:
        """Write the targets of some tokens to v (s, b, d)."""
        c = _convolution(u).conv(u[tokens], weight, self.chunk_ids[tokens])
        if projection is None:
            v[tokens] = c
        else:
            torch.mm(c.flatten(0, 1), projection, out=v[tokens].flatten(0, 1))

    def backward(self, dv: Tensor, u: Tensor, weight: Tensor, projection: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of (u, weight, projection) from that of the targets."""
        if self.tp_group is not None and self.tp_group.size() > 1:
            dist.all_reduce(dv, group=self.tp_group)
        module, dprojection = _convolution(u), None
        if projection is not None:
            c = module.conv(u, weight, self.chunk_ids)
            dprojection = c.flatten(0, 1).t() @ dv.flatten(0, 1)
            dv = dv @ projection.t()
        du, dweight = module.conv_backward(dv.contiguous(), u, weight, self.chunk_ids)
        return du, dweight, dprojection


class ChunkTargets:
    """Targets that ``fast_weight_linear`` computes itself, slice by slice, given in the place of v.

    Under context parallelism the carry of the first slice is then on its way to other ranks before the targets of the
    second slice are computed.

    Args:
        u: (s, b, d), what the convolution reads: the MLP's inputs, or the embeddings.
        weight: (d, 1, kernel), kernel odd.
        projection: (d, d), applied from the right. None: none.
        chunk_ids: (s,) integers; neighbouring tokens are in one chunk where theirs are equal.
        tp_group: tensor-parallel group over which f is split. Each rank then has a part of the targets' gradient, and
            the parts are summed.
    """

    def __init__(
        self,
        u: Tensor,
        weight: Tensor,
        projection: Tensor | None,
        chunk_ids: Tensor,
        tp_group: dist.ProcessGroup | None = None,
    ):
        self.recipe = TargetRecipe(chunk_ids, tp_group)
        self.tensors = u, weight, projection

    def materialise(self) -> Tensor:
        """Return the targets of all tokens, (s, b, d), differentiable in u, weight and projection."""
        return _ChunkTarget.apply(self.recipe, *self.tensors)


def chunk_target(u: Tensor, weight: Tensor, projection: Tensor | None, chunk_ids: Tensor) -> Tensor:
    """Return the targets of all tokens, (s, b, d); arguments as ``ChunkTargets``.

    Only u is saved for the backward, which the layer saves anyway.
    """
    return ChunkTargets(u, weight, projection, chunk_ids).materialise()


class _ChunkTarget(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recipe: TargetRecipe, u, weight, projection):
        ctx.recipe = recipe
        ctx.save_for_backward(u, weight, projection)
        v = recipe.allocate(u)
        recipe.write(v, slice(None), u, weight, projection)
        return v

    @staticmethod
    @once_differentiable
    def backward(ctx, dv):
        if ctx.recipe.tp_group is not None:
            dv = dv.clone()  # summed in place
        return None, *ctx.recipe.backward(dv, *ctx.saved_tensors)


def _convolution(u: Tensor):
    """Return the module with ``conv`` and ``conv_backward`` for a tensor: the kernels', or this one."""
    if u.is_cuda and u.dtype != torch.float64:
        from inplace_ttt.ttt.backends import triton_conv

        return triton_conv
    return sys.modules[__name__]


def conv(u: Tensor, weight: Tensor, chunk_ids: Tensor) -> Tensor:
    """Return the convolution alone, (s, b, d); arguments as ``ChunkTargets``."""
    out = torch.zeros_like(u)
    for tap, here, there, inside in _taps(u.shape[0], weight.shape[-1], chunk_ids):
        reached = u[there] if inside is None else u[there] * inside
        out[here].addcmul_(reached, weight[:, 0, tap].expand_as(reached))
    return out


def conv_backward(g: Tensor, u: Tensor, weight: Tensor, chunk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of u and weight from that of the output, g (s, b, d)."""
    du = torch.zeros_like(u)
    dweight = torch.zeros(weight.shape, dtype=state_dtype(weight.dtype), device=u.device)
    for tap, here, there, inside in _taps(u.shape[0], weight.shape[-1], chunk_ids):
        reaching = g[here] if inside is None else g[here] * inside
        du[there].addcmul_(reaching, weight[:, 0, tap].expand_as(reaching))
        dweight[:, 0, tap] = (reaching * u[there]).sum(dim=(0, 1), dtype=dweight.dtype)
    return du, dweight.to(weight.dtype)


def _taps(length: int, kernel: int, chunk_ids: Tensor):
    """Yield for each tap: its index, output tokens, the input tokens it reads, and where both are in one chunk."""
    for tap in range(kernel):
        shift = tap - kernel // 2
        if abs(shift) >= length:
            continue
        here = slice(max(0, -shift), length - max(0, shift))
        there = slice(max(0, shift), length + min(0, shift))
        inside = None if shift == 0 else (chunk_ids[here] == chunk_ids[there]).view(-1, 1, 1)
        yield tap, here, there, inside
