"""Clip updates: rescale a chunk's update where its norm exceeds a limit (arXiv 2604.06169, appendix C.2).

With ``S = sum_t v_t z_t^T`` over a chunk and ``n = eta |S|``, the update is ``c eta S``, ``c = min(1, limit / n)``. It
is the unclipped update of targets ``c v_t``, so clipping rescales targets before the scan. Backward, with dv' the
gradient of the rescaled targets and ``h = sum_t dv'_t . v_t``:

    dv_t = c dv'_t - (c h / |S|^2) S z_t        dz_t -= (c h / |S|^2) S^T v_t        for a chunk that was rescaled

``S z_t = sum_u v_u (z_u . z_t)`` and ``S^T v_t = sum_u z_u (v_u . v_t)`` come from the chunk's Gram matrices, as does
``|S|^2``, or from S itself where that is smaller.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.ttt.plan import Span, evenly_spaced
from inplace_ttt.ttt.products import outer_sum, prefers_gram, squared_norms_of_spans, stack_spans, state_dtype


def sum_over(group: dist.ProcessGroup | None, values: Tensor) -> Tensor:
    """Return the sum over a group's ranks, in place."""
    if group is not None and group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


def weight_norm(weight: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Return the Frobenius norm of a weight (d, f) whose columns may be split over a group, as a scalar tensor."""
    norm = torch.linalg.vector_norm(weight.detach(), dtype=state_dtype(weight.dtype))
    return sum_over(tp_group, norm.square()).sqrt()


@dataclass
class _ClippedChunks:
    """Evenly spaced chunks of one batch row."""

    batch: int
    spans: tuple[Span, ...]
    uses_grams: bool  # otherwise S itself
    grams: tuple[Tensor, Tensor] | None  # (n, t, t) of v and of z, from the forward to the first backward


class UpdateClip:
    """Clip the updates of a call, and differentiate that."""

    def __init__(self, limit: Tensor, eta: float, tp_group: dist.ProcessGroup | None):
        """``limit``: the largest norm of one chunk's update, a scalar tensor. ``tp_group``: over which f is split."""
        self.limit, self.eta, self.tp_group = limit, eta, tp_group
        self.parts: list[_ClippedChunks] = []
        self.norms: list[Tensor] = []  # by part: (n,), |S|^2 over all ranks of the group
        self.factors: list[Tensor] = []  # by part: (n,), c

    def clip(self, v: Tensor, z: Tensor, spans: tuple[Span, ...], *, for_backward: bool) -> None:
        """Rescale the targets of some chunks in place.

        Args:
            v: (s, b, d).
            z: (s, b, f).
        """
        if not spans:
            return
        parts, norms = [], []
        for group in evenly_spaced(spans):
            for batch in range(z.shape[1]):
                stacked = [stack_spans(t[:, batch], group) for t in (v, z)]
                uses_grams, grams = prefers_gram(group[0][1] - group[0][0], v.shape[2], z.shape[2]), None
                if uses_grams:
                    grams = tuple(t @ t.mT for t in stacked)
                    norms.append((grams[0] * grams[1]).sum((1, 2), dtype=state_dtype(z.dtype)).clamp(min=0))
                else:
                    norms.append(squared_norms_of_spans(v[:, [batch]], z[:, [batch]], group)[0])
                parts.append(_ClippedChunks(batch, group, uses_grams, grams if for_backward else None))
        sizes = [len(part.spans) for part in parts]
        norms = sum_over(self.tp_group, torch.cat(norms)).split(sizes)
        for part, squared in zip(parts, norms, strict=True):
            length = abs(self.eta) * squared.sqrt()
            factor = torch.where(length > self.limit, self.limit / length, 1.0)
            stack_spans(v[:, part.batch], part.spans).mul_(factor[:, None, None].to(v.dtype))
            self.factors.append(factor)
        self.parts += parts
        self.norms += norms

    def squared_norms(self, b: int) -> Tensor:
        """Return (b, chunks), |S|^2 of all chunks that were clipped so far, in token order."""
        rows = [[] for _ in range(b)]
        for part, norms in zip(self.parts, self.norms, strict=True):
            rows[part.batch].append(norms)
        return torch.stack([torch.cat(row) for row in rows])

    def backward(self, dv: Tensor, dz: Tensor, v: Tensor, z: Tensor) -> None:
        """Turn the gradient of the rescaled targets into that of the targets, and add to dz, in place.

        Args:
            v: (s, b, d), the rescaled targets.
            z: (s, b, f).
        """
        if not self.parts:
            return
        dtype = state_dtype(z.dtype)
        products = (dv * v).sum(-1, dtype=dtype)  # (s, b)
        sums = [
            stack_spans(products[:, part.batch, None], part.spans).sum((1, 2)) / factor
            for part, factor in zip(self.parts, self.factors, strict=True)
        ]
        sizes = [len(part.spans) for part in self.parts]
        sums = sum_over(self.tp_group, torch.cat(sums)).split(sizes)
        for part, squared, factor, h in zip(self.parts, self.norms, self.factors, sums, strict=True):
            shares = torch.where(factor < 1, h / squared, 0.0)[:, None, None]
            part_v, part_z, part_dv, part_dz = (stack_spans(t[:, part.batch], part.spans) for t in (v, z, dv, dz))
            factor = factor[:, None, None]
            part_dv.mul_(factor.to(dv.dtype))
            if part.uses_grams:
                if part.grams is None:  # another backward of the same graph
                    part.grams = ((part_v @ part_v.mT) / factor.square()).to(v.dtype), part_z @ part_z.mT
                (gram_v, gram_z), part.grams = part.grams, None
                part_dz.baddbmm_(gram_v * (factor * shares).to(z.dtype), part_z, alpha=-1)
                part_dv.baddbmm_(gram_z * shares.to(v.dtype), part_v, alpha=-1)
                continue
            for number in range(len(part.spans)):
                s = outer_sum(part_v[number], part_z[number]) * shares[number]  # of the rescaled targets: c S h / |S|^2
                part_dz[number].addmm_(part_v[number], (s / factor[number]).to(z.dtype), alpha=-1)
                part_dv[number].addmm_(part_z[number], s.t().to(v.dtype), alpha=-1)
