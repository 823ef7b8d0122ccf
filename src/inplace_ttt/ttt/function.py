"""The fast-weight linear map as one differentiable operation: forward, hand-written backward, what is saved.

With g_t = dL/do_t, W_i the weight that chunk i sees and G_i the sum of g_t z_t^T over later chunks of the same
document (out_t = W_i z_t, W_i = W + eta * sum_{j < i} sum_{t in j} v_t z_t^T):

    dL/dz_t = W_i^T g_t + eta * G_i^T v_t        dL/dv_t = eta * G_i z_t        dL/dW = sum_t g_t z_t^T

So the forward is a prefix sweep that writes eta * v; the backward meets each W_i again, and makes a suffix sweep that
writes g. The W_i are kept from the forward or swept again: the same numbers, for memory or for one product more.
"""

import functools
import itertools
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from inplace_ttt.ttt import chunked
from inplace_ttt.ttt.chunked import Window, add_outer, apply, outer, stacked, state_dtype
from inplace_ttt.ttt.plan import Plan, evenly_spaced, make_plan, runs
from inplace_ttt.ttt.walk import Exchange, Walk

# Ways in which sums pass between context-parallel ranks
PREFIXES = ("ring", "ring_messages")
# Chunk weights are kept for the backward where they take no more than this share of the free device memory, all layers'
# together whose weights live at a time
KEPT_SHARE = 0.125
# Of whose pairs the products are held at a time: 64 MiB of fp32 for documents of 2048 tokens
PAIRED_TOKENS = 8192


@dataclass
class Received:
    """The sums that came from other slices in a forward; given to the same forward again, nothing is communicated."""

    carries: dict[int, Tensor] | None = None  # by stop; None: no forward has filled it


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
    prefix: str = "ring",
    keep_chunk_weights: bool | None = None,
    kept_layers: int = 1,
    received: Received | None = None,
    before_second_slice: Callable[[], None] | None = None,
    return_update_norms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (s, b, d)
    """Down-projection with fast weights (Feng et al., arXiv 2604.06169, section 3): apply, then update.

    ``out_t = (weight + eta * sum_j sum_{t' in chunk j} v_t' z_t'^T) z_t``, j over the chunks of ``chunk_size`` tokens
    that come before t's chunk in the same document. Differentiable in z, v and weight; sums over tokens are fp32
    (fp64 for fp64 operands). The kernels add updates to the weight itself, so what they sum is exact to about 2^-24 of
    the weight: less than its rounding to bf16, but the norm of updates below 1e-5 of the weight is mostly rounding.

    On Hopper, bf16 operands with ``chunk_size``, d and f multiples of 64 go through the kernels; others fall back to
    plain torch products, with a warning where there is CUDA.

    Args:
        z, v: inputs of the down-projection and targets, sequence first; s is the length on this rank.
        weight: the slow weight that every document starts from.
        eta: learning rate of the updates.
        cu_seqlens: bounds of the documents in the *whole* sequence, from 0 to its length, the same for every row of
            the batch. None: each row is one document.
        cp_group: context-parallel group of n ranks; this one holds slices r and 2n-1-r of 2n, in that order. Slices
            must start on chunk boundaries. The gradient of weight is to be summed over the group: each rank has that
            of the documents that start on it.
        comm_dtype: dtype of the sums on the wire; None is the dtype they are summed in.
        prefix: how the sums pass between ranks, one of PREFIXES. ``ring``: through memory that the GPUs of a host map
            into each other where they can, else by messages. ``ring_messages``: by messages of the group's backend.
        keep_chunk_weights: keep the weight of every chunk (2 d f s / chunk_size bytes in bf16) for the backward
            rather than make it a second time there, which costs one product of s d f more. None: where kernels run and
            what is to be kept, times ``kept_layers``, is at most an eighth of the free device memory. Not kept, they
            are made in windows of at most 768 MiB, where sums pass between ranks 1536 MiB, or of one chunk's.
        kept_layers: of how many such calls the kept weights live at a time: of those whose backwards come after the
            last one's forward.
        received: filled with the sums that come from other slices; filled by an earlier call with the same operands,
            it takes the place of the exchange. So recompute does not communicate again.
        before_second_slice: called once, before the second of this rank's slices (half of its tokens) is read from z
            and v: what makes it may wait until then, so that other ranks have the sums of the first one earlier.
        return_update_norms: also return the squared Frobenius norm of the summed updates at the end of each
            document that ends on this rank, (b * documents,), outside the graph.

    Raises:
        LayoutError: the sequence, its documents, the slices and the chunks do not fit together.
        ValueError: shapes or dtypes do not fit, or ``prefix`` is none of PREFIXES.
    """
    _check_operands(z, v, weight)
    if prefix not in PREFIXES:
        raise ValueError(f"prefix='{prefix}' is not known: use one of {', '.join(PREFIXES)}")
    cp_size, cp_rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
    documents = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    plan = make_plan(z.shape[0] * cp_size, chunk_size, documents, cp_size, cp_rank)
    exchange = None
    if cp_size > 1:
        exchange = Exchange(cp_group, comm_dtype or state_dtype(z.dtype), mailboxes=prefix == "ring")
    sweep = _choose_sweep(z, v, chunk_size, eta)
    kernels = sweep is not chunked.sweep
    copied = kernels and not all(map(_is_aligned, (z, v)))
    if before_second_slice is not None and (exchange is None or copied):
        before_second_slice()
        before_second_slice = None
    if kernels:
        z, v, weight = _aligned(z), _aligned(v), _aligned(weight)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (z, v, weight))
    keep = needs_grad and kernels
    if keep:
        kept = 2 * weight.numel() * plan.sweep_chunks * z.shape[1] * kept_layers
        keep = keep_chunk_weights if keep_chunk_weights is not None else kept <= KEPT_SHARE * _free_bytes(z.device)
    how = _How(eta, plan, exchange, sweep, keep, return_update_norms)
    out, norms = _FastWeightLinear.apply(z, v, weight, how, received, before_second_slice)
    return (out, norms) if return_update_norms else out


def _choose_sweep(z: Tensor, v: Tensor, chunk_size: int, eta: float) -> Callable:
    """The kernels' sweep where it can do what is asked, else its twin."""
    if not z.is_cuda:
        return chunked.sweep
    reason = why_no_kernels(z, v, chunk_size, eta)
    if reason is not None:
        _say_once(f"fast weights without their kernels, several times slower: {reason}")
        return chunked.sweep
    from inplace_ttt.ttt.kernels import chunk_weights

    return chunk_weights.sweep


def why_no_kernels(z: Tensor, v: Tensor, chunk_size: int, eta: float) -> str | None:
    """What keeps the kernels from operands on a GPU; None: nothing."""
    try:
        from inplace_ttt.ttt.kernels import chunk_weights
    except ImportError as error:
        return f"they cannot be loaded ({error})"
    return chunk_weights.why_unsupported(z, v, chunk_size, eta)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor as the kernels' loads want it."""
    return tensor if _is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _is_aligned(tensor: Tensor) -> bool:
    """Rows are without gaps and start at multiples of 16 bytes."""
    size = tensor.element_size()
    starts = (tensor.data_ptr(), *(stride * size for stride in tensor.stride()[:-1]))
    return tensor.stride(-1) == 1 and not any(start % 16 for start in starts)


def _free_bytes(device: torch.device) -> int:
    """Device memory that this process could still use: free, or in the allocator's hands and unused."""
    return torch.cuda.mem_get_info(device)[0] + (
        torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    )


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
    if not z.dtype == v.dtype == weight.dtype or not z.is_floating_point():
        raise ValueError(
            f"z, v and weight must have one floating-point dtype, not {z.dtype}, {v.dtype} and {weight.dtype}"
        )


@dataclass(frozen=True)
class _How:
    """What the operation depends on besides its operands."""

    eta: float
    plan: Plan
    exchange: Exchange | None  # None: no other rank holds a part of the sequence
    sweep: Callable
    keep: bool
    with_norms: bool

    def prefix(self, z, v, weight, **options) -> Walk:
        """The walk on which chunks meet the weights they see, in documents that cross the edges of slices."""
        return Walk(self.plan.prefix, weight, v, z, self.eta, self.exchange, self.sweep, **options)

    def suffix(self, z, g, **options) -> Walk:
        """The walk on which they meet the gradients of what they wrote."""
        return Walk(self.plan.suffix, None, g, z, 1.0, self.exchange, self.sweep, **options)

    def inner_prefix(self, z, v, weight, **options) -> Iterator[tuple[int, Window]]:
        """(batch row, chunks with the weights they see) of documents that cross no edge."""
        return self._sweep_rows(self.plan.inner, weight, v, z, self.eta, **options)

    def inner_suffix(self, z, g, **options) -> Iterator[tuple[int, Window]]:
        """(batch row, chunks with the gradients of what they wrote) of the same documents."""
        return self._sweep_rows(self.plan.inner_reversed, None, g, z, 1.0, **options)

    def _sweep_rows(self, segments, base, a, z, scale, norms: Tensor | None = None, **options):
        if not segments:
            return
        for batch in range(z.shape[1]):
            of_row = None if norms is None else norms[batch]
            for window in self.sweep(segments, base, None, a[:, batch], z[:, batch], scale, norms=of_row, **options):
                yield batch, window
                del window  # its memory is the next one's

    def alone(self, weight: Tensor, b: int) -> Iterator[tuple[int, Window]]:
        """(batch row, neighbours with the weight they see) of documents of one chunk."""
        for batch, run in itertools.product(range(b), runs(self.plan.alone)):
            yield batch, ((run,), weight[None])

    def norms_of_alone(self, z: Tensor, v: Tensor) -> Tensor:
        """(b, documents): squared norms of what documents of one chunk write."""
        norms = torch.empty(z.shape[1], len(self.plan.alone), dtype=state_dtype(z.dtype), device=z.device)
        first = 0
        for documents in evenly_spaced(self.plan.alone):
            last = first + len(documents)
            for batch in range(z.shape[1]):
                norms[batch, first:last] = _squared_norms(*(stacked(t[:, batch], documents) for t in (v, z)))
            first = last
        return self.eta**2 * norms


class _FastWeightLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, v, weight, how: _How, received: Received | None, before_second_slice: Callable | None):
        out, b = torch.empty_like(v), z.shape[1]
        room = sys.maxsize if how.keep else None
        kept, kept_inner, carries, norms = defaultdict(list), [], {}, []

        def at_stop(stop):
            if stop == len(how.plan.prefix) - 1 and before_second_slice is not None:
                before_second_slice()

        if how.exchange is not None:
            came = None if received is None else received.carries
            walk = how.prefix(z, v, weight, carries=came, room=room, meanwhile=at_stop, with_norms=how.with_norms)
            for stop, batch, rows, window in walk.windows():
                apply(window, z[:, batch], out[:, batch, rows], transpose=True)
                if how.keep:
                    kept[stop].append((batch, rows, window))
                del window  # its memory is the next one's
            carries = walk.carries
            if how.with_norms:
                norms.append(walk.norms.sum(0))
        if received is not None:
            received.carries = carries
        of_inner = None
        if how.with_norms:
            of_inner = torch.empty(b, len(how.plan.inner), dtype=state_dtype(z.dtype), device=z.device)
            norms += [of_inner, how.norms_of_alone(z, v)]
        for batch, window in how.inner_prefix(z, v, weight, norms=of_inner, room=room):
            apply(window, z[:, batch], out[:, batch], transpose=True)
            if how.keep:
                kept_inner.append((batch, window))
            del window
        for batch, window in how.alone(weight, b):
            apply(window, z[:, batch], out[:, batch], transpose=True)

        norms = torch.cat([part.flatten() for part in norms]) if norms else z.new_zeros(0, dtype=state_dtype(z.dtype))
        ctx.save_for_backward(z, v, weight, *carries.values())
        ctx.how, ctx.stops = how, list(carries)
        # not as saved tensors: the backward frees them once it has used them
        ctx.kept, ctx.kept_inner = (kept, kept_inner) if how.keep else (None, None)
        ctx.mark_non_differentiable(norms)
        return out, norms

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        z, v, weight, *carries = ctx.saved_tensors
        carries = dict(zip(ctx.stops, carries, strict=True))
        how, kept, kept_inner = ctx.how, ctx.kept, ctx.kept_inner
        ctx.kept = ctx.kept_inner = None
        g = g.contiguous()
        if how.sweep is not chunked.sweep:
            g = _aligned(g)
        dz, dv = torch.empty_like(z), torch.zeros_like(v)
        dweight = torch.zeros(weight.shape, dtype=state_dtype(weight.dtype), device=weight.device)
        # Others wait for the sums of the rank that starts them, which therefore leaves its other stop for later.
        starts = how.exchange is not None and how.plan.suffix[0].source is None

        def through_weights(stop: int) -> None:
            """dz = W_i^T g, with the chunk weights of the forward; the suffix sums may then use their memory."""
            if stop > 0 and not starts:
                return
            last = len(how.plan.prefix) - 1
            stops = (last - stop,) if starts else range(last + 1)  # on the walk in the other direction
            if kept is None:
                windows = how.prefix(z, v, weight, carries=carries, only=stops).windows()
            else:
                windows = ((number, *item) for number in stops if number in kept for item in _emptied(kept[number]))
            for _, batch, rows, window in windows:
                apply(window, g[:, batch, rows], dz[:, batch], transpose=False, add=rows.start > 0)
                del window

        def through_gradients(batch: int, rows: slice, window: Window) -> None:
            """The terms of dz and dv that come of what the chunks wrote."""
            apply(window, v[:, batch, rows], dz[:, batch], transpose=False, alpha=how.eta, add=True)
            apply(window, z[:, batch], dv[:, batch, rows], transpose=True, alpha=how.eta)

        if how.exchange is not None:
            room = None if kept is None else _bytes(itertools.chain.from_iterable(kept.values()))
            walk = how.suffix(z, g, add_to=dweight, meanwhile=through_weights, room=room)
            for _, batch, rows, window in walk.windows():
                through_gradients(batch, rows, window)
                del window
            del walk  # and the sums that came
        room = None if kept_inner is None else _bytes(kept_inner)
        windows = how.inner_prefix(z, v, weight) if kept_inner is None else _emptied(kept_inner)
        for batch, window in windows:
            apply(window, g[:, batch], dz[:, batch], transpose=False)
            del window
        for batch, window in how.inner_suffix(z, g, add_to=dweight, room=room):
            through_gradients(batch, slice(None), window)
            del window
        for batch, window in how.alone(weight, z.shape[1]):
            apply(window, g[:, batch], dz[:, batch], transpose=False)
            tokens = slice(*window[0][0])
            add_outer(dweight, g[tokens, batch], z[tokens, batch])
        return dz, dv, dweight.to(weight.dtype), None, None, None


def _bytes(items: Iterable) -> int:
    """Of chunk weights."""
    return sum(weights.nbytes for *_, (_, weights) in items)


def _squared_norms(
    v: Tensor,  # (documents, t, d)
    z: Tensor,  # (documents, t, f)
) -> Tensor:  # (documents,)
    """Squared Frobenius norms of ``sum_t v_t z_t^T``, by whichever product is smaller: the sum, (d, f), or those of all
    pairs of tokens, ``sum_tu (v_t . v_u) (z_t . z_u)``."""
    t, d, f = v.shape[1], v.shape[2], z.shape[2]
    if t * (d + f) >= d * f:
        return torch.stack([torch.linalg.vector_norm(outer(*of_one)).square() for of_one in zip(v, z, strict=True)])
    few = max(1, PAIRED_TOKENS // t)
    norms = [
        (outer(some_v.mT, some_v.mT) * outer(some_z.mT, some_z.mT)).sum((1, 2))
        for some_v, some_z in zip(v.split(few), z.split(few), strict=True)
    ]
    return torch.cat(norms).clamp(min=0)


def _emptied(items: list) -> Iterator:
    """The items one by one, none of which the list still holds when it is used."""
    while items:
        yield items.pop(0)
