"""How the tokens of a micro batch lie: which documents, and which slices of the sequence this rank holds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from inplace_ttt.ttt import Received
from inplace_ttt.ttt.plan import Plan, check_documents, document_parts, local_slices, slice_bounds
from inplace_ttt.ttt.target import chunk_ids


@dataclass
class SequenceLayout(PackedSeqParams):
    """Travels through Megatron in the place of packed_seq_params; its tensors stay (s, b, h), zigzag over the sequence.

    Megatron's own packed format cuts every document into 2n slices; chunks would be cut with it. Here the whole
    sequence is cut, and documents are known by their bounds.
    """

    documents: tuple[int, ...] | None = None  # bounds in the whole sequence; None: each row is one document
    cached: dict[tuple, Tensor] = field(default_factory=dict, repr=False, compare=False)

    # Of a forward that will be recomputed, by module: what it received from other context-parallel ranks; its
    # attention's output, with the graph behind it, and where that puts the gradients of its inputs
    received: dict[object, Received] = field(default_factory=dict, repr=False, compare=False)
    attention: dict[object, tuple[Tensor, list[Tensor]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def cu_seqlens(self) -> Tensor | None:
        """(n_docs + 1,) int32 on the CPU."""
        return None if self.documents is None else torch.tensor(self.documents, dtype=torch.int32)

    def chunk_ids(self, plan: Plan, device: torch.device) -> Tensor:
        """(s,) for each local token a number that its chunk alone has."""
        return self.on_device(plan.chunk_lengths, lambda: chunk_ids(plan.chunk_lengths), device)

    def on_device(self, key, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """One copy on the device for all layers of what ``make`` makes on the CPU."""
        if (key, device) not in self.cached:
            self.cached[key, device] = make().to(device, non_blocking=True)
        return self.cached[key, device]


def take_local(tensor: Tensor, cp_size: int, cp_rank: int, dim: int) -> Tensor:
    """This rank's two slices of a tensor that holds the whole sequence along ``dim``."""
    if cp_size == 1:
        return tensor
    edges = slice_bounds(tensor.shape[dim], cp_size)
    parts = [tensor.narrow(dim, edges[i], edges[i + 1] - edges[i]) for i in local_slices(cp_size, cp_rank)]
    return torch.cat(parts, dim=dim)


def in_sequence_order(gathered: Tensor, cp_size: int) -> Tensor:
    """Undo the zigzag of tensors that were concatenated rank by rank along the first dimension."""
    if cp_size == 1:
        return gathered
    slices = gathered.chunk(2 * cp_size, dim=0)
    place = {index: at for at, index in enumerate(i for rank in range(cp_size) for i in local_slices(cp_size, rank))}
    return torch.cat([slices[place[index]] for index in range(2 * cp_size)])


@dataclass(frozen=True)
class QuerySpan:
    """Consecutive local queries of one document, and the keys (in the whole sequence) that any of them may see."""

    local: slice
    keys: slice


@lru_cache(maxsize=64)
def query_spans(
    seq_length: int, documents: tuple[int, ...] | None, cp_size: int, cp_rank: int, window: int | None
) -> tuple[QuerySpan, ...]:
    """Cut this rank's queries so that each part has one range of keys. With a window, parts are short like it."""
    bounds, edges = check_documents(documents, seq_length), slice_bounds(seq_length, cp_size)
    spans, base = [], 0
    for index in local_slices(cp_size, cp_rank):
        first, last = edges[index], edges[index + 1]
        for start, _, left, right in document_parts(bounds, first, last):
            step = right - left if window is None else max(window, 256)
            for begin in range(left, right, step):
                stop = min(begin + step, right)
                oldest = start if window is None else max(start, begin - window + 1)
                local = slice(begin - first + base, stop - first + base)
                spans.append(QuerySpan(local, slice(oldest, stop)))
        base += last - first
    return tuple(spans)


@lru_cache(maxsize=64)
def query_runs(
    seq_length: int, documents: tuple[int, ...] | None, cp_size: int, cp_rank: int
) -> tuple[tuple[QuerySpan, ...], ...]:
    """The query spans in runs whose queries, and whose keys, lie one after the other."""
    runs = []
    for span in query_spans(seq_length, documents, cp_size, cp_rank, None):
        last = runs[-1][-1] if runs else None
        if last and (last.local.stop, last.keys.stop) == (span.local.start, span.keys.start):
            runs[-1].append(span)
        else:
            runs.append([span])
    return tuple(map(tuple, runs))
