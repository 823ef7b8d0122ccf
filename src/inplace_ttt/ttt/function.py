"""The fast-weight linear map as one differentiable operation: forward, hand-written backward, what is saved.

With g_t = dL/do_t, W_i the weight that chunk i sees and G_i the sum of g_t z_t^T over later chunks of the same
document (out_t = W_i z_t, W_i = W + eta * sum_{j < i} sum_{t in j} v_t z_t^T):

    dL/dz_t = W_i^T g_t + eta * G_i^T v_t        dL/dv_t = eta * G_i z_t        dL/dW = sum_t g_t z_t^T

So the forward is a prefix sweep that writes eta * v; the backward repeats it to meet each W_i again, and makes a
suffix sweep that writes g. No chunk's weight is kept: memory does not grow with the number of chunks.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from inplace_ttt.ttt.chunked import segment_sum, state_dtype, sweep
from inplace_ttt.ttt.plan import Plan, Stop, make_plan
from inplace_ttt.ttt.prefix import PrefixRing

# Rows travel in this many blocks: enough to hide most transfers, few enough to keep the products large.
ROW_BLOCKS = 4


def fast_weight_linear(
    z: Tensor,  # (s, b, f)
    v: Tensor,  # (s, b, d)
    weight: Tensor,  # (d, f)
    *,
    eta: float,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,) int32
    cp_group: dist.ProcessGroup | None = None,
    comm_dtype: torch.dtype | None = None,
    return_update_norms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (s, b, d)
    """Down-projection with fast weights (Feng et al., arXiv 2604.06169, section 3): apply, then update.

    ``out_t = (weight + eta * sum_j sum_{t' in chunk j} v_t' z_t'^T) z_t``, j over the chunks of ``chunk_size`` tokens
    that come before t's chunk in the same document. Differentiable in z, v and weight; sums over tokens are fp32
    (fp64 for fp64 operands).

    Args:
        z, v: inputs of the down-projection and targets, sequence first; s is the length on this rank.
        weight: the slow weight that every document starts from.
        eta: learning rate of the updates.
        cu_seqlens: bounds of the documents in the *whole* sequence, from 0 to its length, the same for every row of
            the batch. None: each row is one document.
        cp_group: context-parallel group of n ranks; this one holds slices r and 2n-1-r of 2n, in that order. Slices
            must start on chunk boundaries.
        comm_dtype: dtype of the sums on the wire; None is the dtype they are summed in.
        return_update_norms: also return the squared Frobenius norm of the summed updates at the end of each
            document that ends on this rank, (b * documents,), outside the graph.

    Raises:
        LayoutError: the sequence, its documents, the slices and the chunks do not fit together.
        ValueError: shapes or dtypes do not fit.
    """
    _check_operands(z, v, weight)
    cp_size, cp_rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
    documents = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    plan = make_plan(z.shape[0] * cp_size, chunk_size, documents, cp_size, cp_rank)
    exchange = _Exchange(cp_group if cp_size > 1 else None, comm_dtype or state_dtype(z.dtype))
    out, norms = _FastWeightLinear.apply(z, v, weight, eta, plan, exchange, return_update_norms)
    return (out, norms) if return_update_norms else out


def _check_operands(z: Tensor, v: Tensor, weight: Tensor) -> None:
    if z.dim() != 3 or v.dim() != 3 or weight.dim() != 2:
        raise ValueError(
            f"fast_weight_linear takes z (s, b, f), v (s, b, d) and weight (d, f), "
            f"not {tuple(z.shape)}, {tuple(v.shape)} and {tuple(weight.shape)}"
        )
    if z.shape[:2] != v.shape[:2] or weight.shape != (v.shape[2], z.shape[2]):
        raise ValueError(
            f"z {tuple(z.shape)}, v {tuple(v.shape)} and weight {tuple(weight.shape)} do not fit: "
            f"expected (s, b, f), (s, b, d) and (d, f)"
        )
    if not z.dtype == v.dtype == weight.dtype:
        raise ValueError(f"z, v and weight must have one dtype, not {z.dtype}, {v.dtype} and {weight.dtype}")


@dataclass(frozen=True)
class _Exchange:
    """How sums travel: along which group (None: nowhere), in which dtype."""

    group: dist.ProcessGroup | None
    comm_dtype: torch.dtype

    def ring(self, stops: tuple[Stop, ...], blocks: list["_Block"], z: Tensor) -> PrefixRing:
        return PrefixRing(
            stops,
            [(block.rows.stop - block.rows.start, z.shape[2]) for block in blocks],
            group=self.group,
            dtype=state_dtype(z.dtype),
            comm_dtype=self.comm_dtype,
            device=z.device,
        )


@dataclass(frozen=True)
class _Block:
    """An independent part of the operation: some rows of the state of one row of the batch."""

    batch: int
    rows: slice


def _blocks(batch: int, d: int, exchange: _Exchange) -> list[_Block]:
    parts = min(ROW_BLOCKS, d) if exchange.group is not None else 1
    edges = [d * part // parts for part in range(parts + 1)]
    return [_Block(row, slice(low, high)) for row in range(batch) for low, high in itertools.pairwise(edges)]


def _hand_in(ring: PrefixRing, stops: tuple[Stop, ...], blocks: list[_Block], a: Tensor, z: Tensor, scale: float):
    """Sum up what each slice wrote to the document that goes on beyond it, and put it on the ring."""
    for number, stop in enumerate(stops):
        for index, block in enumerate(blocks):
            own = None
            if stop.target is not None:
                own = segment_sum(stop.segments[-1], a[:, block.batch, block.rows], z[:, block.batch], scale)
            ring.put(number, index, own)


class _FastWeightLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, v, weight, eta: float, plan: Plan, exchange: _Exchange, with_norms: bool):
        out = torch.empty_like(v)
        blocks = _blocks(v.shape[1], v.shape[2], exchange)
        ring = exchange.ring(plan.prefix, blocks, z)
        _hand_in(ring, plan.prefix, blocks, v, z, eta)
        carries, norms = [], {}
        for number, stop in enumerate(plan.prefix):
            for index, block in enumerate(blocks):
                carry = ring.get(number, index)
                carries.append(carry)
                z_row, v_row = z[:, block.batch], v[:, block.batch, block.rows]
                for place, segment in enumerate(stop.segments):
                    received = carry if segment.receives else None
                    base = weight[block.rows] if received is None else weight[block.rows] + received
                    whole = None
                    if with_norms and not segment.sends:
                        whole = z.new_zeros(v_row.shape[1], z_row.shape[1], dtype=state_dtype(z.dtype))
                    for chunk, chunk_weight in sweep(segment, base, v_row, z_row, eta, whole):
                        tokens = slice(*chunk)
                        out[tokens, block.batch, block.rows] = z_row[tokens] @ chunk_weight.t()
                    if whole is not None:
                        total = whole if received is None else whole + received
                        key = number, place, block.batch
                        norms[key] = norms.get(key, 0) + total.square().sum()
        ring.finish()
        ctx.save_for_backward(z, v, weight, *carries)
        ctx.eta, ctx.plan, ctx.exchange = eta, plan, exchange
        norms = torch.stack(list(norms.values())) if norms else z.new_zeros(0, dtype=state_dtype(z.dtype))
        ctx.mark_non_differentiable(norms)
        return out, norms

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        z, v, weight, *carries = ctx.saved_tensors
        eta, plan, exchange = ctx.eta, ctx.plan, ctx.exchange
        blocks = _blocks(v.shape[1], v.shape[2], exchange)
        g = g.contiguous()
        ring = exchange.ring(plan.suffix, blocks, z)
        _hand_in(ring, plan.suffix, blocks, g, z, 1.0)  # on its way while the prefix is swept again

        dz, dv = torch.zeros_like(z), torch.zeros_like(v)
        dweight = torch.zeros(weight.shape, dtype=state_dtype(weight.dtype), device=weight.device)
        carries = iter(carries)
        for stop in plan.prefix:
            for block in blocks:
                carry = next(carries)
                z_row, v_row = z[:, block.batch], v[:, block.batch, block.rows]
                for segment in stop.segments:
                    base = weight[block.rows] + carry if segment.receives else weight[block.rows]
                    for chunk, chunk_weight in sweep(segment, base, v_row, z_row, eta):
                        tokens = slice(*chunk)
                        dz[tokens, block.batch].addmm_(g[tokens, block.batch, block.rows], chunk_weight)

        for number, stop in enumerate(plan.suffix):
            for index, block in enumerate(blocks):
                carry = ring.get(number, index)
                z_row, v_row, g_row = (t[:, block.batch] for t in (z, v[:, :, block.rows], g[:, :, block.rows]))
                for segment in stop.segments:
                    base = carry if segment.receives else None
                    whole = torch.zeros(v_row.shape[1], z_row.shape[1], dtype=dweight.dtype, device=z.device)
                    for chunk, later in sweep(segment, base, g_row, z_row, 1.0, whole):
                        if later is None:
                            continue
                        tokens = slice(*chunk)
                        dz[tokens, block.batch].addmm_(v_row[tokens], later, alpha=eta)
                        dv[tokens, block.batch, block.rows] = (z_row[tokens] @ later.t()).mul_(eta)
                    dweight[block.rows] += whole
        ring.finish()
        return dz, dv, dweight.to(weight.dtype), None, None, None, None
