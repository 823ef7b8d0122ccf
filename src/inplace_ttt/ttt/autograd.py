"""Run the forward of the operation and its hand-written backward.

With g_t = dL/do_t, W_i the weight that chunk i uses and G_i the sum of g_t z_t^T over later chunks of the same document
(out_t = W_i z_t, W_i = W + eta * sum_{j < i} sum_{t in j} v_t z_t^T):

    dL/dz_t = W_i^T g_t + eta * G_i^T v_t        dL/dv_t = eta * G_i z_t        dL/dW = sum_t g_t z_t^T

The forward runs a prefix scan that adds eta * v z^T. The backward needs each W_i again and runs a suffix scan that adds
g z^T. The W_i are kept from the forward (memory) or recomputed (one more product), with identical values. The initial
state is the first carry of the prefix scan, and the gradient of the final state is the first carry of the suffix scan.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from inplace_ttt.ttt.backends import Backend
from inplace_ttt.ttt.clipping import UpdateClip, sum_over, weight_norm
from inplace_ttt.ttt.order import Task, backward_order, forward_order
from inplace_ttt.ttt.plan import CALLER, Plan, ScanStage, merge_adjacent
from inplace_ttt.ttt.products import add_outer_sum, squared_norms_of_spans, state_dtype
from inplace_ttt.ttt.rule import ScanStep, UpdateRule, is_papers
from inplace_ttt.ttt.scan import Carries, Exchange, SavedCarries, Scan
from inplace_ttt.ttt.target import ChunkTargets
from inplace_ttt.ttt.window import Window, WindowPool


@dataclass
class CarryCache:
    """Cache the incoming carries of a forward, so that its recompute does not communicate again."""

    incoming: dict[int, Tensor] | None = None  # (b, d, f) by scan stage; None: not filled yet


@dataclass(frozen=True)
class OpContext:
    """Hold the non-tensor arguments of one call of the operation."""

    plan: Plan
    backend: Backend
    exchange: Exchange
    rule: UpdateRule
    eta: float
    clip: float | None
    tp_group: dist.ProcessGroup | None
    keep: bool  # True: keep chunk weights for the backward
    needs_grad: bool
    carry_cache: CarryCache | None
    with_norms: bool
    with_ratios: bool

    @property
    def prefix_step(self) -> ScanStep:
        """Return the step of the prefix scan: ``step(state, v, z)`` applies a chunk's update to the state in place."""
        return ScanStep(self.rule, self.eta, suffix=False)

    @property
    def suffix_step(self) -> ScanStep:
        """Return the step of the suffix scan: ``step(suffix, g, z)`` converts dL/dS after a chunk, in place.

        The result is dL/dS before the chunk.
        """
        return ScanStep(self.rule, 1.0, suffix=True)

    def inner_windows(
        self,
        base: Tensor | None,
        a: Tensor,
        z: Tensor,
        step: ScanStep,
        pool: WindowPool,
        *,
        norms: Tensor | None = None,
        total: Tensor | None = None,
        max_window_bytes: int | None = None,
    ) -> Iterator[tuple[int, Window]]:
        """Yield (batch row, window) of the documents inside one stage."""
        segments = self.plan.inner_reversed if step.suffix else self.plan.inner
        if not segments:
            return
        for batch in range(z.shape[1]):
            windows = self.backend.scan(
                segments,
                base,
                a[:, batch],
                z[:, batch],
                step,
                pool,
                total=total,
                norms=None if norms is None else norms[batch],
                max_window_bytes=max_window_bytes,
            )
            for window in windows:
                yield batch, window

    def norms_of_single_chunks(self, v: Tensor, z: Tensor) -> Tensor:
        """Return the squared norms of the states at the ends of documents of one chunk, (b, documents)."""
        spans = self.plan.single_chunk_documents
        if is_papers(self.rule):
            return self.eta**2 * squared_norms_of_spans(v, z, spans)
        norms = torch.empty(z.shape[1], len(spans), dtype=state_dtype(z.dtype), device=z.device)
        for batch, (number, (start, end)) in itertools.product(range(z.shape[1]), enumerate(spans)):
            state = torch.zeros(v.shape[2], z.shape[2], dtype=norms.dtype, device=z.device)
            self.rule.update_state(state, v[start:end, batch], z[start:end, batch], self.eta)
            norms[batch, number] = state.square().sum()
        return norms

    def single_chunk_windows(self, weight: Tensor, b: int) -> Iterator[tuple[int, Window]]:
        """Yield (batch row, window) of single-chunk documents; adjacent documents share a window."""
        for batch, span in itertools.product(range(b), merge_adjacent(self.plan.single_chunk_documents)):
            yield batch, Window((span,), weight[None])


class _Targets:
    """Compute and clip the targets of a scan, stage by stage."""

    def __init__(self, call: OpContext, source: ChunkTargets | None, z: Tensor, weight: Tensor, v: Tensor):
        self.call, self.source, self.z, self.v = call, source, z, v
        self.weight_norm = self.clip = None
        if call.clip is not None or call.with_ratios:
            self.weight_norm = weight_norm(weight, call.tp_group)
        if call.clip is not None:
            if source is None:  # v belongs to the caller
                self.v = v.clone(memory_format=torch.contiguous_format)
            self.clip = UpdateClip(call.clip * self.weight_norm, call.eta, call.tp_group, v.shape)

    def prepare(self, stage: ScanStage) -> None:
        """Compute and clip the targets of a stage's tokens."""
        if self.source is not None:
            self.source.write(self.v, slice(*stage.tokens))
        if self.clip is not None:
            chunks = tuple(c for c in self.call.plan.chunks if stage.tokens[0] <= c[0] < stage.tokens[1])
            self.clip.clip(self.v, self.z, chunks, for_backward=self.call.needs_grad)

    def ratios(self) -> Tensor:
        """Return norms of unclipped updates / norm of the weight, (b, chunks that a later chunk reads)."""
        plan = self.call.plan
        read = [number for number, is_read in enumerate(plan.read_chunks) if is_read]
        if self.clip is not None:
            squared = self.clip.squared_norms(self.z.shape[1])[:, read]
        else:
            squared = squared_norms_of_spans(self.v, self.z, tuple(plan.chunks[number] for number in read))
            squared = sum_over(self.call.tp_group, squared)
        return abs(self.call.eta) * squared.sqrt() / self.weight_norm


class FastWeightLinear(torch.autograd.Function):
    """Run the operation with a hand-written backward.

    Inputs: call, source, z (s, b, f), weight (d, f), initial updates (b, d, f) or None, v (s, b, d). Outputs: out
    (s, b, d), final updates (b, d, f) or None, norms, ratios. If ``source`` is given, v is its uninitialised output
    buffer, which the forward fills stage by stage.
    """

    @staticmethod
    def forward(ctx, call: OpContext, source: ChunkTargets | None, z, weight, initial, v):
        """Return out, the final updates, norms and ratios; see the class for the shapes.

        Norms are (b * documents,), ratios (b, chunks), both without gradient, and empty unless ``call`` requests them.
        """
        (s, b, f), d = z.shape, weight.shape[0]
        plan, cache, pool = call.plan, call.carry_cache, WindowPool(keep=call.keep)
        out = z.new_empty(s, b, d)
        targets = _Targets(call, source, z, weight, v)
        carries: Carries
        if cache is not None and cache.incoming is not None:
            carries = SavedCarries(cache.incoming, d)
        else:
            carries = call.exchange.carries(plan.prefix, (b, d, f), z, initial)
        limit = sys.maxsize if call.keep else None
        scan = Scan(
            plan.prefix, weight, targets.v, z, call.prefix_step, carries, call.backend, pool,
            with_norms=call.with_norms, max_window_bytes=limit,
        )  # fmt: skip
        kept: list[list] = [[] for _ in plan.prefix]
        kept_inner = []
        scan.open(0)
        for task, number in forward_order(plan):
            if task is Task.TARGETS:
                targets.prepare(plan.prefix[number])
            elif task is Task.SCAN:
                if number:
                    scan.open(number)
                windows = scan.windows(number)
            else:
                for batch, rows, window in windows:
                    window.apply(z[:, batch], out[:, batch, rows], transpose=True)
                    if call.keep:
                        kept[number].append((batch, rows, window))
        scan.finish()
        if cache is not None:
            cache.incoming = carries.incoming
        inner_norms = None
        if call.with_norms:
            inner_norms = torch.empty(b, len(plan.inner), dtype=state_dtype(z.dtype), device=z.device)
        for batch, window in call.inner_windows(
            weight, targets.v, z, call.prefix_step, pool, norms=inner_norms, max_window_bytes=limit
        ):
            window.apply(z[:, batch], out[:, batch], transpose=True)
            if call.keep:
                kept_inner.append((batch, window))
        for batch, window in call.single_chunk_windows(weight, b):
            window.apply(z[:, batch], out[:, batch], transpose=True)

        norms = ratios = z.new_zeros(0, dtype=state_dtype(z.dtype))
        if call.with_norms:
            single = call.norms_of_single_chunks(targets.v, z)
            norms = torch.cat([part.flatten() for part in (scan.norms.sum(0), inner_norms, single)])
        ratios = targets.ratios() if call.with_ratios else norms.new_zeros(b, 0)
        ctx.save_for_backward(z, targets.v, weight, *carries.incoming.values())
        ctx.call, ctx.clip, ctx.stages = call, targets.clip, list(carries.incoming)
        # not as saved tensors: the backward reuses their memory
        ctx.kept, ctx.kept_inner = (kept, kept_inner) if call.keep else (None, None)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(norms, ratios)
        final = carries.outgoing[len(plan.prefix) - 1] if plan.prefix[-1].target == CALLER else None
        return out, final, norms, ratios

    @staticmethod
    @once_differentiable
    def backward(ctx, g, dfinal, _norms, _ratios):
        """Return the gradients of z, weight, the initial updates (or None) and v.

        Args:
            g: (s, b, d), gradient of out; None: zero.
            dfinal: (b, d, f), gradient of the final updates; None: zero.
        """
        call = ctx.call
        z, v, weight, *incoming = ctx.saved_tensors
        incoming = dict(zip(ctx.stages, incoming, strict=True))
        kept, kept_inner, ctx.kept, ctx.kept_inner = ctx.kept, ctx.kept_inner, None, None
        g = z.new_zeros(v.shape) if g is None else g.contiguous()
        if call.backend.needs_alignment and g.data_ptr() % 16:
            g = g.clone()
        dz, dv, dweight, dinitial = _gradients(call, z, v, weight, incoming, kept, kept_inner, g, dfinal)
        if ctx.clip is not None:
            ctx.clip.backward(dv, dz, v, z)
        return None, None, dz, dweight.to(weight.dtype), dinitial, dv


def _gradients(
    call: OpContext,
    z: Tensor,
    v: Tensor,  # (s, b, d), after clipping
    weight: Tensor,
    incoming: dict[int, Tensor],  # incoming carries of the prefix scan, by stage
    kept: list[list] | None,  # by stage: (batch row, rows, window); cleared here. None: recompute
    kept_inner: list | None,  # (batch row, window); cleared here
    g: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of z, v, weight (in the state's dtype) and the initial updates (or None).

    All chunk weights are freed when this function returns.
    """
    plan, backend, rule = call.plan, call.backend, call.rule
    (_, b, f), d = z.shape, weight.shape[0]
    dz, dv = torch.empty_like(z), torch.zeros_like(v)
    dweight = torch.zeros(weight.shape, dtype=state_dtype(weight.dtype), device=weight.device)
    total = dweight if rule.suffix_is_weight_gradient else None
    pool = WindowPool()
    prefix = Scan(plan.prefix, weight, v, z, call.prefix_step, SavedCarries(incoming, d), backend, pool)

    def add_through_weights(number: int) -> None:
        """Set dz = W_i^T g in one stage, and give the memory of kept chunk weights to the suffix scan."""
        for batch, rows, window in prefix.windows(number) if kept is None else kept[number]:
            window.apply(g[:, batch, rows], dz[:, batch], transpose=False, add=rows.start > 0)
            if kept is not None:
                pool.give(window.weights)
        if kept is not None:
            kept[number].clear()

    if plan.suffix[0].source == CALLER and dfinal is None:
        dfinal = torch.zeros(b, d, f, dtype=dweight.dtype, device=z.device)
    carries = call.exchange.carries(plan.suffix, (b, d, f), z, None if dfinal is None else dfinal.contiguous())
    limit = None if kept is None else _weight_bytes(itertools.chain.from_iterable(kept))
    suffix = Scan(
        plan.suffix, None, g, z, call.suffix_step, carries, backend, pool, total=total, max_window_bytes=limit
    )
    stages, windows = len(plan.prefix), {}
    holds_windows = kept is not None and suffix.scans_at_once
    suffix.open(0)
    for task, number in backward_order(plan, holds_windows):
        if task is Task.OUTPUTS:
            add_through_weights(stages - 1 - number)
        elif task is Task.SCAN:
            if number:
                suffix.open(number)
            windows[number] = suffix.held_windows(number) if holds_windows else suffix.windows(number)
        else:
            for batch, rows, window in windows[number]:
                if task is not Task.INPUT_GRADIENTS:
                    rule.target_gradients(window, z[:, batch], dv[:, batch, rows], call.eta)
                if task is not Task.TARGET_GRADIENTS:
                    rule.add_input_gradients(window, v[:, batch, rows], dz[:, batch], call.eta)
    pool.release()
    suffix.finish()
    limit = None if kept_inner is None else _weight_bytes(kept_inner)
    inner = call.inner_windows(weight, v, z, call.prefix_step, pool) if kept_inner is None else kept_inner
    for batch, window in inner:
        window.apply(g[:, batch], dz[:, batch], transpose=False)
        if kept_inner is not None:
            pool.give(window.weights)
    if kept_inner is not None:
        kept_inner.clear()
    for batch, window in call.inner_windows(None, g, z, call.suffix_step, pool, total=total, max_window_bytes=limit):
        rule.target_gradients(window, z[:, batch], dv[:, batch], call.eta)
        rule.add_input_gradients(window, v[:, batch], dz[:, batch], call.eta)
    for batch, window in call.single_chunk_windows(weight, b):
        window.apply(g[:, batch], dz[:, batch], transpose=False)
        if rule.suffix_is_weight_gradient:
            tokens = slice(*window.chunks[0])
            add_outer_sum(dweight, g[tokens, batch], z[tokens, batch])
    if not rule.suffix_is_weight_gradient:
        for batch in range(b):
            add_outer_sum(dweight, g[:, batch], z[:, batch])
    dinitial = carries.outgoing[stages - 1] if plan.suffix[-1].target == CALLER else None
    if rule.suffix_is_weight_gradient:
        # dweight holds the suffix scan's states at document starts. Add the one that went to the initial state, and
        # subtract dfinal, which this sequence's tokens did not contribute.
        if dinitial is not None:
            dweight += dinitial.sum(0)
        if plan.suffix[0].source == CALLER:
            dweight -= dfinal.sum(0)
    return dz, dv, dweight, dinitial


def _weight_bytes(items) -> int:
    """Return the bytes of chunk weights, given tuples whose last element is a window."""
    return sum(window.weights.nbytes for *_, window in items)
