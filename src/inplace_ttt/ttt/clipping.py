"""Clip updates: rescale a chunk's update if its norm exceeds a limit (arXiv 2604.06169, appendix C.2).

With ``S = sum_t v_t z_t^T`` over a chunk and ``n = eta |S|``, the clipped update is ``c eta S``, ``c = min(1, limit /
n)``. It equals the unclipped update of targets ``c v_t``, so clipping rescales the targets before the scan. Backward,
where dv' is the gradient of the rescaled targets and ``h = sum_t dv'_t . v_t``:

    dv_t = c dv'_t - (c h / |S|^2) S z_t        dz_t -= (c h / |S|^2) S^T v_t        for each rescaled chunk

``S z_t = sum_u v_u (z_u . z_t)``, ``S^T v_t = sum_u z_u (v_u . v_t)`` and ``|S|^2`` are computed from the chunk's Gram
matrices, or from S itself if S is smaller.
"""

import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt.plan import Span, evenly_spaced
from inplace_ttt.ttt.products import gram, outer_sum, prefers_gram, squared_norms_of_spans, stack_spans, state_dtype


def sum_over(group: dist.ProcessGroup | None, values: Tensor) -> Tensor:
    """Sum values over the ranks of a group, in place, and return them."""
    if group is not None and group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


def weight_norm(weight: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Return the Frobenius norm of a weight (d, f), as a scalar tensor; ``tp_group`` may split its columns."""
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float64)  # squares of small fp32 norms underflow
    return sum_over(tp_group, norm.square()).sqrt().to(state_dtype(weight.dtype))


def scale_rows(x: Tensor, factors: Tensor) -> None:
    """Multiply each row of x (rows, width) by its factor (rows,), in place."""
    x.mul_(factors[:, None].to(x.dtype))


def dot_and_scale_rows(x: Tensor, y: Tensor, factors: Tensor) -> Tensor:
    """Return the dot products (rows,) of rows of x and y (rows, width), and scale x by factors (rows,) in place."""
    dots = (x * y).sum(1, dtype=factors.dtype)
    scale_rows(x, factors)
    return dots


def _rows(x: Tensor):
    """Return the module that provides the two functions above for x: triton_rows or this one."""
    if x.is_cuda and x.dtype != torch.float64:
        from inplace_ttt.ttt.backends import triton_rows

        return triton_rows
    return sys.modules[__name__]


@dataclass
class _ClippedChunks:
    """Hold evenly spaced chunks of one batch row, with their norms and clip factors."""

    batch: int
    spans: tuple[Span, ...]
    squared: Tensor  # (n,), |S|^2: of this rank's columns, after the all-reduce of all columns
    uses_grams: bool  # True: use Gram matrices; False: use S
    grams: tuple[Tensor, Tensor] | None  # (n, t, t) of v and of z, freed by the first backward
    factor: Tensor | None = None  # (n,), c, computed after the all-reduce

    @property
    def divisor(self) -> Tensor:
        """Return c, or 1 where c is 0. There the weight is zero or the norm infinite, and all gradients are zero."""
        return torch.where(self.factor > 0, self.factor, 1.0)


class UpdateClip:
    """Clip the updates of one call, and compute the gradients of clipping."""

    def __init__(self, limit: Tensor, eta: float, tp_group: dist.ProcessGroup | None, shape: torch.Size):
        """Start without chunks.

        Args:
            limit: scalar, the largest norm of one chunk's update.
            tp_group: tensor-parallel group that splits f.
            shape: (s, b, d), shape of the targets.
        """
        self.limit, self.eta, self.tp_group = limit, eta, tp_group
        self.parts: list[_ClippedChunks] = []
        self.factors = limit.new_ones(*shape[:2])  # (s, b), clip factor of each token's chunk

    def clip(self, v: Tensor, z: Tensor, spans: tuple[Span, ...], *, for_backward: bool) -> None:
        """Rescale the targets of contiguous chunks, in place.

        Args:
            v: (s, b, d), targets.
            z: (s, b, f), inputs of the down-projection.
            spans: (first token, one past the last) of each chunk, in token order.
            for_backward: keep Gram matrices for the backward.
        """
        if not spans or not z.shape[1]:
            return
        parts = [
            self._chunks(v, z, batch, group, for_backward)
            for group in evenly_spaced(spans)
            for batch in range(z.shape[1])
        ]
        squared = sum_over(self.tp_group, torch.cat([part.squared for part in parts]))
        for part, own in zip(parts, squared.split([len(part.spans) for part in parts]), strict=True):
            part.squared = own
            norm = abs(self.eta) * part.squared.sqrt()
            part.factor = torch.where(norm > self.limit, self.limit / norm, 1.0)
            stack_spans(self.factors[:, part.batch : part.batch + 1], part.spans).copy_(part.factor[:, None, None])
        tokens = slice(spans[0][0], spans[-1][1])
        _rows(v).scale_rows(v[tokens].view(-1, v.shape[2]), self.factors[tokens].view(-1))
        self.parts += parts

    def _chunks(self, v: Tensor, z: Tensor, batch: int, spans: tuple[Span, ...], for_backward: bool) -> _ClippedChunks:
        """Return evenly spaced chunks of a batch row with the squared norms of S, of this rank's columns."""
        if not prefers_gram(spans[0][1] - spans[0][0], v.shape[2], z.shape[2]):
            squared = squared_norms_of_spans(v[:, [batch]], z[:, [batch]], spans)[0]
            return _ClippedChunks(batch, spans, squared, False, None)
        grams = gram(stack_spans(v[:, batch], spans)), gram(stack_spans(z[:, batch], spans))
        squared = (grams[0] * grams[1]).sum((1, 2), dtype=state_dtype(z.dtype)).clamp(min=0)
        return _ClippedChunks(batch, spans, squared, True, grams if for_backward else None)

    def squared_norms(self, b: int) -> Tensor:
        """Return |S|^2 of all chunks passed to ``clip``, in token order, (b, chunks)."""
        if not b:
            return self.limit.new_zeros(0, sum(len(part.spans) for part in self.parts))
        rows = [[part.squared for part in self.parts if part.batch == batch] for batch in range(b)]
        return torch.stack([torch.cat(row) for row in rows])

    def backward(self, dv: Tensor, dz: Tensor, v: Tensor, z: Tensor) -> None:
        """Convert the gradient of the rescaled targets to that of the targets, and update dz, in place.

        Args:
            dv: (s, b, d), gradient of the rescaled targets.
            dz: (s, b, f), gradient of z.
            v: (s, b, d), the rescaled targets.
            z: (s, b, f).
        """
        if not self.parts:
            return
        # <dv'_t, c v_t>
        dots = _rows(v).dot_and_scale_rows(*(t.view(-1, v.shape[2]) for t in (dv, v)), self.factors.view(-1))
        dots = dots.view_as(self.factors)
        sums = torch.cat(
            [stack_spans(dots[:, part.batch : part.batch + 1], part.spans).sum((1, 2)) for part in self.parts]
        )
        sums = sum_over(self.tp_group, sums / torch.cat([part.divisor for part in self.parts]))
        for part, h in zip(self.parts, sums.split([len(part.spans) for part in self.parts]), strict=True):
            rescaled = (part.factor > 0) & (part.factor < 1)
            share = torch.where(rescaled, h / part.squared, 0.0)  # coefficient of S z_t and S^T v_t, divided by c
            self._subtract(part, share, *(stack_spans(t[:, part.batch], part.spans) for t in (dv, dz, v, z)))

    def _subtract(self, part: _ClippedChunks, share: Tensor, dv: Tensor, dz: Tensor, v: Tensor, z: Tensor) -> None:
        """Subtract ``c share S z_t`` from dv_t and ``c share S^T v_t`` from dz_t, all (n, t, ...); v is ``c v_t``."""
        if part.uses_grams:
            of_v = share * part.factor
            if part.grams is None:  # a second backward of the same graph
                part.grams, of_v = (gram(v), gram(z)), share / part.divisor
            (gram_v, gram_z), part.grams = part.grams, None
            dz.baddbmm_(_scaled(gram_v, of_v), z, alpha=-1)
            dv.baddbmm_(_scaled(gram_z, share), v, alpha=-1)
            return
        for number in range(len(part.spans)):
            s = outer_sum(v[number], z[number]) * share[number]  # c share S
            dz[number].addmm_(v[number], (s / part.divisor[number]).to(z.dtype), alpha=-1)
            dv[number].addmm_(z[number], s.t().to(v.dtype), alpha=-1)


def _scaled(matrices: Tensor, factors: Tensor) -> Tensor:
    """Multiply each of n square matrices (n, t, t) by its factor (n,), in place, and return them."""
    t = matrices.shape[1]
    _rows(matrices).scale_rows(matrices.view(-1, t), factors.repeat_interleave(t))
    return matrices
