"""Apply the fast-weight linear map, which training, evaluation and prefill call."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.operation import KEPT_SHARE
from inplace_ttt.ttt.autograd import CarryCache, FastWeightLinear, OpContext
from inplace_ttt.ttt.backends import choose_backend
from inplace_ttt.ttt.plan import CALLER, LayoutError, Plan, check_documents, make_plan
from inplace_ttt.ttt.products import state_dtype
from inplace_ttt.ttt.rule import PAPER_RULE, UpdateRule, is_papers
from inplace_ttt.ttt.scan import Exchange
from inplace_ttt.ttt.state import FastWeightState, check_state, zero_state
from inplace_ttt.ttt.target import ChunkTargets
from inplace_ttt.ttt.transport import PREFIXES


def fast_weight_linear(
    z: Tensor,  # (s, b, f)
    v: Tensor | ChunkTargets,  # (s, b, d)
    weight: Tensor,  # (d, f)
    *,
    eta: float,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,) int32
    cp_group: dist.ProcessGroup | None = None,
    initial_state: FastWeightState | None = None,
    output_final_state: bool = False,
    clip: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    rule: UpdateRule = PAPER_RULE,
    plan: Plan | None = None,
    backend: str = "auto",
    comm_dtype: torch.dtype | None = None,
    prefix: str | Exchange = "ring",
    keep_chunk_weights: bool | None = None,
    kept_layers: int = 1,
    carry_cache: CarryCache | None = None,
    return_update_norms: bool = False,
    return_update_ratios: bool = False,
) -> Any:  # (s, b, d), or a tuple that begins with it
    """Apply a down-projection with fast weights (Feng et al., arXiv 2604.06169, section 3): apply, then update.

    ``out_t = (weight + eta * sum_j sum_{t' in chunk j} v_t' z_t'^T) z_t``, where j runs over the chunks of
    ``chunk_size`` tokens before t's chunk in the same document. Differentiable in z, v, weight and the initial state.

    Sums over tokens are accumulated in fp32 (fp64 for fp64 operands). The kernels keep weight + updates in one
    accumulator, so a sum of updates has an absolute error of about 2^-24 |weight|. This is below the bf16 rounding of
    the weight, but norms of updates below 1e-5 |weight| are dominated by rounding.

    On Hopper, bf16 operands use the kernels if ``chunk_size``, d and f are multiples of 64. All other operands use
    torch matrix products, on CUDA with a warning.

    Example::

        >>> z, v, weight = torch.randn(100, 2, 8), torch.randn(100, 2, 4), torch.randn(4, 8)
        >>> options = dict(eta=0.1, chunk_size=16)
        >>> whole = fast_weight_linear(z, v, weight, **options)
        >>> first, state = fast_weight_linear(z[:70], v[:70], weight, output_final_state=True, **options)
        >>> rest = fast_weight_linear(z[70:], v[70:], weight, initial_state=state, **options)
        >>> torch.allclose(torch.cat([first, rest]), whole, atol=1e-5)
        True

    Args:
        z: (s, b, f), inputs of the down-projection; s is the number of tokens on this rank.
        v: (s, b, d), targets, or ``ChunkTargets``, which compute the targets slice by slice.
        weight: (d, f), the slow weight, from which every document starts.
        eta: learning rate of the updates.
        cu_seqlens: (n_docs + 1,), document bounds in the *whole* sequence, from 0 to its length, the same for every
            row of the batch. None: each row is one document.
        cp_group: context-parallel group of n ranks. Rank r holds slices r and 2n-1-r of 2n slices, in that order.
            Slices must start on chunk boundaries. The caller must sum the gradient of weight over the group: each rank
            returns the gradient of the documents that start on it.
        initial_state: state before the first document. Under context parallelism only rank 0, which holds the first
            and the last slice, uses it; other ranks ignore it.
        output_final_state: also return the state after the last document. Under context parallelism only rank 0
            returns it; other ranks return None.
        clip: largest Frobenius norm of one chunk's update, divided by the norm of weight (appendix C.2). A larger
            update is rescaled when its chunk is complete. The norm of weight is not differentiated. None: no clipping.
        tp_group: tensor-parallel group that splits f; ``clip`` and ``return_update_ratios`` sum squared norms over it.
        rule: update rule; rules other than the paper's run on the torch backend.
        plan: ``make_plan`` of the same sequence, which all layers can share. None: compute it here.
        backend: ``auto``, ``torch`` or ``hopper``.
        comm_dtype: dtype of carries between ranks. None: the dtype of the state.
        prefix: transport of carries between ranks. ``ring``: symmetric memory if the GPUs of the group can map each
            other's memory, otherwise point-to-point messages. ``ring_messages``: point-to-point messages of the group's
            backend. Also accepts an ``Exchange``.
        keep_chunk_weights: True: keep the weight of every chunk (2 d f s / chunk_size bytes in bf16) for the backward.
            False: recompute it there, in windows of at most 768 MiB (1536 MiB if ranks exchange carries) or of one
            chunk; this costs one more product of s d f. None: keep the weights if the kernels run and the weights of
            ``kept_layers`` layers take at most an eighth of the free device memory.
        kept_layers: number of layers whose saved chunk weights are alive at once.
        carry_cache: cache of the incoming carries. An empty cache is filled. A cache that an earlier call with the
            same operands filled replaces the exchange, so that recompute does not communicate again.
        return_update_norms: also return the squared Frobenius norm of the state at the end of each document that ends
            on this rank, (b * documents,), without gradient. With ``output_final_state`` the last document is excluded.
        return_update_ratios: also return the norm of each local chunk's update before clipping, divided by the norm of
            weight, for chunks whose update a later chunk uses, (b, chunks), without gradient.

    Returns:
        out (s, b, d). If more is requested, a tuple of out and, in this order, the final state, the update norms and
        the update ratios.

    Raises:
        LayoutError: the sequence, documents, slices and chunks do not fit together.
        ValueError: shapes, dtypes or options are not supported.
    """
    _check_operands(z, v, weight)
    _check_options(eta, chunk_size, cu_seqlens, initial_state, clip, prefix)
    cp_size, cp_rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
    s, d = z.shape[0], weight.shape[0]
    documents = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    bounds = tuple(sorted(set(check_documents(documents, s * cp_size)))) if s else (0,)
    if not is_papers(rule) and (clip is not None or return_update_ratios):
        raise ValueError(f"clip and return_update_ratios support only the paper's rule, not '{rule.name}'")
    if plan is None:
        plan = make_plan(s * cp_size, chunk_size, documents, cp_size, cp_rank)
    elif (plan.local_length, plan.chunk_size, plan.cp_size, plan.cp_rank) != (s, chunk_size, cp_size, cp_rank):
        raise ValueError(
            f"plan is for {plan.local_length} tokens on rank {plan.cp_rank} of {plan.cp_size} and chunk_size="
            f"{plan.chunk_size}; this call has {s} tokens on rank {cp_rank} of {cp_size} and chunk_size={chunk_size}"
        )
    elif plan.bounds != bounds:
        raise ValueError(
            f"plan is for documents that end at {plan.bounds[1:]}, but those of cu_seqlens end at {bounds[1:]}"
        )
    first_is_empty, last_is_empty = False, False
    if documents is not None:
        first_is_empty, last_is_empty = documents[1] == 0, documents[-2] == documents[-1]
    if initial_state is not None:
        check_state(initial_state, z, d, chunk_size)
        if cp_size > 1 and initial_state.unfinished:
            raise LayoutError(
                f"initial_state holds {initial_state.unfinished} tokens of an unfinished chunk: under context "
                f"parallelism a sequence continues at a chunk boundary (chunk_size={chunk_size})"
            )
        if cp_rank > 0 or first_is_empty:
            initial_state = None
    if carry_cache is not None and (output_final_state or initial_state is not None):
        raise ValueError(
            "carry_cache cannot be combined with initial_state or output_final_state: it holds only incoming carries"
        )
    if isinstance(prefix, str):
        if prefix not in PREFIXES:
            raise ValueError(f"prefix='{prefix}' is not known: use one of {', '.join(PREFIXES)}")
        group = cp_group if cp_size > 1 else None
        prefix = Exchange(group, comm_dtype or state_dtype(z.dtype), symmetric_memory=prefix == "ring")
    options = _Options(
        eta=eta,
        clip=clip,
        tp_group=tp_group,
        rule=rule,
        backend=backend,
        exchange=prefix,
        keep_chunk_weights=keep_chunk_weights,
        kept_layers=kept_layers,
        carry_cache=carry_cache,
        with_norms=return_update_norms,
        with_ratios=return_update_ratios,
    )
    hands_out_state = output_final_state and not last_is_empty
    if initial_state is not None and initial_state.unfinished:
        result = _continue_chunk(z, v, weight, plan, initial_state, hands_out_state, options)
    else:
        result = _run(z, v, weight, plan.with_state(initial_state is not None, hands_out_state), initial_state, options)
    if output_final_state and last_is_empty and cp_rank == 0:
        result = replace(result, state=zero_state(z, d))
    found: list = [result.out]
    if output_final_state:
        found.append(result.state)
    if return_update_norms:
        found.append(result.norms)
    if return_update_ratios:
        found.append(result.ratios)
    return tuple(found) if len(found) > 1 else result.out


def _check_options(eta, chunk_size, cu_seqlens, initial_state, clip, prefix) -> None:
    """Raise ValueError for an option with a wrong type or value."""

    def is_number(value) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    if not is_number(eta):
        raise ValueError(f"eta={eta!r} is not a finite number")
    if clip is not None and not (is_number(clip) and clip > 0):
        raise ValueError(f"clip={clip!r} must be above 0 (largest update norm / weight norm); use None for no clipping")
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise ValueError(f"chunk_size={chunk_size!r} is not a whole number")
    if cu_seqlens is not None and not (isinstance(cu_seqlens, Tensor) and not cu_seqlens.is_floating_point()):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}: use an integer tensor of document bounds")
    if initial_state is not None and not isinstance(initial_state, FastWeightState):
        raise ValueError(f"initial_state is a {type(initial_state).__name__}: use a FastWeightState")
    if not isinstance(prefix, str | Exchange):
        raise ValueError(f"prefix={prefix!r} is not known: use one of {', '.join(PREFIXES)}")


def _check_operands(z: Tensor, v: Tensor | ChunkTargets, weight: Tensor) -> None:
    if z.dim() != 3 or len(v.shape) != 3 or weight.dim() != 2:
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
class _Options:
    """Hold the options of a call, without operands and states."""

    eta: float
    clip: float | None
    tp_group: dist.ProcessGroup | None
    rule: UpdateRule
    backend: str
    exchange: Exchange
    keep_chunk_weights: bool | None
    kept_layers: int
    carry_cache: CarryCache | None
    with_norms: bool
    with_ratios: bool


@dataclass(frozen=True)
class _Result:
    out: Tensor
    state: FastWeightState | None
    norms: Tensor
    ratios: Tensor


def _run(
    z: Tensor,
    v: Tensor | ChunkTargets,
    weight: Tensor,
    plan: Plan,
    initial_state: FastWeightState | None,  # must not have an unfinished chunk
    options: _Options,
) -> _Result:
    """Run the operation on the chunks of the plan."""
    hands_out_state = plan.prefix[-1].target == CALLER
    unfinished = 0
    if hands_out_state and not plan.prefix[-1].segments[-1].last_writes:
        unfinished = plan.chunk_lengths[-1]
    if isinstance(v, ChunkTargets) and unfinished:
        v = v.materialise()
    backend = choose_backend(options.backend, z, weight.shape[0], plan.chunk_size, options.eta, options.rule)
    source = None
    if isinstance(v, ChunkTargets):
        source, v = v, v.allocate()
    if backend.needs_alignment:
        z, weight, v = _aligned(z), _aligned(weight), _aligned(v)
    updates = None if initial_state is None else initial_state.updates.contiguous()
    operands = z, weight, updates, v
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    keep = needs_grad and options.keep_chunk_weights
    if needs_grad and options.keep_chunk_weights is None and backend.keeps_by_default:
        kept_bytes = z.element_size() * weight.numel() * plan.scanned_chunks * z.shape[1] * options.kept_layers
        keep = kept_bytes <= KEPT_SHARE * _free_bytes(z.device)
    call = OpContext(
        plan=plan,
        backend=backend,
        exchange=options.exchange,
        rule=options.rule,
        eta=options.eta,
        clip=options.clip,
        tp_group=options.tp_group,
        keep=bool(keep),
        needs_grad=needs_grad,
        carry_cache=options.carry_cache,
        with_norms=options.with_norms,
        with_ratios=options.with_ratios,
    )
    out, updates, norms, ratios = FastWeightLinear.apply(call, source, *operands)
    state = None
    if hands_out_state:
        first = z.shape[0] - unfinished
        pending_v = v[first:] if unfinished else z.new_empty(0, z.shape[1], weight.shape[0])
        state = FastWeightState(updates, z[first:].clone(), pending_v.clone())  # a view keeps all of z
    return _Result(out, state, norms, ratios)


def _continue_chunk(
    z: Tensor,
    v: Tensor | ChunkTargets,
    weight: Tensor,
    plan: Plan,
    state: FastWeightState,
    hands_out_state: bool,
    options: _Options,
) -> _Result:
    """Complete the initial state's unfinished chunk as a separate sequence, then run the remaining tokens."""
    if isinstance(v, ChunkTargets):
        v = v.materialise()
    s, pending, chunk_size = z.shape[0], state.unfinished, plan.chunk_size
    first_document = plan.bounds[1]
    head = min(chunk_size - pending, first_document)  # tokens that belong to the unfinished chunk
    continues = head < first_document
    chunk_z, chunk_v = (torch.cat([kept, given[:head]]) for kept, given in ((state.z, z), (state.v, v)))
    chunk_plan = make_plan(pending + head, chunk_size).with_state(True, continues or (head == s and hands_out_state))
    first = _run(chunk_z, chunk_v, weight, chunk_plan, state, options)
    out = first.out[pending:]
    if head == s:
        return replace(first, out=out)
    bounds = tuple(bound - head for bound in plan.bounds[1:])
    rest_plan = make_plan(s - head, chunk_size, (0, *bounds) if continues else bounds)
    rest_plan = rest_plan.with_state(continues, hands_out_state)
    rest = _run(z[head:], v[head:], weight, rest_plan, first.state if continues else None, options)
    return _Result(
        torch.cat([out, rest.out]),
        rest.state,
        torch.cat([first.norms, rest.norms]),
        torch.cat([first.ratios, rest.ratios], dim=1),
    )


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor with contiguous rows that start at multiples of 16 bytes, as TMA loads require."""
    size = tensor.element_size()
    starts = (tensor.data_ptr(), *(stride * size for stride in tensor.stride()[:-1]))
    if tensor.stride(-1) == 1 and not any(start % 16 for start in starts):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate: free on the device, or reserved by torch and unused."""
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0] + (
        torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    )
