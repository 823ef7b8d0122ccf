"""Compute the targets of the updates: a depthwise convolution of the inputs inside each chunk, then a projection.

``c_t[e] = sum_k w[e, 0, k] * u_{t + k - kernel // 2}[e]`` over taps in t's own chunk only, and ``v_t = c_t P``
(arXiv 2604.06169, section 3.3). A tap into the next chunk would make an update depend on tokens after its chunk.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from inplace_ttt.ttt.products import state_dtype


def chunk_ids(chunk_lengths: tuple[int, ...]) -> Tensor:
    """Return the chunk index of each token, (s,) int32 on the CPU, from ``Plan.chunk_lengths``."""
    lengths = torch.tensor(chunk_lengths)
    return torch.repeat_interleave(torch.arange(len(chunk_lengths), dtype=torch.int32), lengths)


def identity_kernel(shape: tuple[int, ...]) -> Tensor:
    """Return the convolution kernel (d, 1, taps) that changes nothing: 1 at the tap of the token itself."""
    kernel = torch.zeros(shape)
    kernel[..., shape[-1] // 2] = 1.0
    return kernel


class ChunkTargets:
    """Describe targets that ``fast_weight_linear`` computes slice by slice; pass it instead of v.

    Under context parallelism the carry of the first slice can then be sent before the targets of the second slice are
    computed.

    Example::

        >>> u, kernel, projection = torch.randn(12, 1, 4), torch.randn(4, 1, 3), torch.eye(4)
        >>> chunk_ids = torch.arange(12) // 6  # two chunks of six tokens
        >>> v = ChunkTargets(u, kernel, projection, chunk_ids).materialise()
        >>> alone = ChunkTargets(u[:6], kernel, projection, chunk_ids[:6]).materialise()
        >>> torch.allclose(v[:6], alone)  # a target depends only on its own chunk
        True

    Args:
        u: (s, b, d), input of the convolution: the MLP's inputs or the embeddings.
        weight: (d, 1, kernel) of the convolution, kernel odd.
        projection: (d, d), multiplied from the right. None: no projection.
        chunk_ids: (s,) integers; neighbouring tokens with equal values are in one chunk.
        tp_group: tensor-parallel group that splits f. Each rank then computes a partial gradient of the targets; the
            backward sums it over the group.
    """

    def __init__(
        self,
        u: Tensor,
        weight: Tensor,
        projection: Tensor | None,
        chunk_ids: Tensor,
        tp_group: dist.ProcessGroup | None = None,
    ):
        self.u, self.weight, self.projection = u, weight, projection
        self.chunk_ids, self.tp_group = chunk_ids, tp_group

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the targets, (s, b, d), which is that of u."""
        return self.u.shape

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the targets, which is that of u."""
        return self.u.dtype

    def allocate(self) -> Tensor:
        """Return uninitialised memory for the targets, (s, b, d), to be filled by ``write``.

        Its autograd graph already contains u, weight and projection.
        """
        return _ChunkTarget.apply(self.chunk_ids, self.tp_group, self.u, self.weight, self.projection)

    @torch.no_grad()
    def write(self, v: Tensor, tokens: slice) -> None:
        """Write the targets of ``tokens``, which must be whole chunks, to v (s, b, d)."""
        c = _convolution(self.u).conv(self.u[tokens], self.weight, self.chunk_ids[tokens])
        if self.projection is None:
            v[tokens] = c
        else:
            torch.mm(c.flatten(0, 1), self.projection, out=v[tokens].flatten(0, 1))

    def materialise(self) -> Tensor:
        """Return the targets of all tokens, (s, b, d), differentiable in u, weight and projection."""
        v = self.allocate()
        self.write(v, slice(None))
        return v


def chunk_target(u: Tensor, weight: Tensor, projection: Tensor | None, chunk_ids: Tensor) -> Tensor:
    """Return the targets of all tokens, (s, b, d); arguments as for ``ChunkTargets``.

    The backward needs only u, which the layer saves in any case.
    """
    return ChunkTargets(u, weight, projection, chunk_ids).materialise()


class _ChunkTarget(torch.autograd.Function):
    """Differentiate targets. ``ChunkTargets.write`` writes their values, which the backward does not need."""

    @staticmethod
    def forward(ctx, chunk_ids: Tensor, tp_group: dist.ProcessGroup | None, u, weight, projection):
        """Return uninitialised memory for the targets, (s, b, d); arguments as for ``ChunkTargets``."""
        ctx.chunk_ids, ctx.tp_group = chunk_ids, tp_group
        ctx.save_for_backward(u, weight, projection)
        return torch.empty_like(u, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx, dv):
        """Return the gradients of u, weight and projection, given the gradient dv (s, b, d) of the targets.

        With ``tp_group`` dv is partial, and is summed over the group first.
        """
        u, weight, projection = ctx.saved_tensors
        if ctx.tp_group is not None and ctx.tp_group.size() > 1:
            dv = dv.clone()  # autograd may use it elsewhere
            dist.all_reduce(dv, group=ctx.tp_group)
        module, dprojection = _convolution(u), None
        if projection is not None:
            c = module.conv(u, weight, ctx.chunk_ids)
            dprojection = c.flatten(0, 1).t() @ dv.flatten(0, 1)
            dv = dv @ projection.t()
        return None, None, *module.conv_backward(dv.contiguous(), u, weight, ctx.chunk_ids), dprojection


def _convolution(u: Tensor):
    """Return the module that provides ``conv`` and ``conv_backward`` for u: triton_conv or this one."""
    if u.is_cuda and u.dtype != torch.float64:
        from inplace_ttt.ttt.backends import triton_conv

        return triton_conv
    return sys.modules[__name__]


def conv(u: Tensor, weight: Tensor, chunk_ids: Tensor) -> Tensor:
    """Return the convolution without the projection, (s, b, d); arguments as for ``ChunkTargets``."""
    out = torch.zeros_like(u)
    for tap, here, there, inside in _taps(u.shape[0], weight.shape[-1], chunk_ids):
        reached = u[there] if inside is None else u[there] * inside
        out[here].addcmul_(reached, weight[:, 0, tap].expand_as(reached))
    return out


def conv_backward(g: Tensor, u: Tensor, weight: Tensor, chunk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of u (s, b, d) and weight (d, 1, kernel), given the output's gradient g (s, b, d)."""
    du = torch.zeros_like(u)
    dweight = torch.zeros(weight.shape, dtype=state_dtype(weight.dtype), device=u.device)
    for tap, here, there, inside in _taps(u.shape[0], weight.shape[-1], chunk_ids):
        reaching = g[here] if inside is None else g[here] * inside
        du[there].addcmul_(reaching, weight[:, 0, tap].expand_as(reaching))
        dweight[:, 0, tap] = (reaching * u[there]).sum(dim=(0, 1), dtype=dweight.dtype)
    return du, dweight.to(weight.dtype)


def _taps(length: int, kernel: int, chunk_ids: Tensor):
    """Yield for each tap (index, output tokens, input tokens, mask of pairs in one chunk or None if all are)."""
    for tap in range(kernel):
        shift = tap - kernel // 2
        if abs(shift) >= length:
            continue
        here = slice(max(0, -shift), length - max(0, shift))
        there = slice(max(0, shift), length + min(0, shift))
        inside = None if shift == 0 else (chunk_ids[here] == chunk_ids[there]).view(-1, 1, 1)
        yield tap, here, there, inside
