"""Describe the layout of a micro batch: its documents, and the slices of the sequence that a rank holds."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inplace_ttt.ttt.plan import Plan, local_slices, make_plan, slice_bounds
from inplace_ttt.ttt.target import chunk_ids


@dataclass(frozen=True)
class SequenceLayout:
    """Hold the document bounds and one rank's plan of chunks. All layers share one layout. It is picklable."""

    documents: tuple[int, ...] | None = None  # document bounds in the whole sequence; None: each row is one document
    plan: Plan | None = None  # None: the model has no fast weights
    chunk_ids: Tensor | None = None  # (s,) int32, chunk index of each local token

    def with_plan(self, seq_length: int, chunk_size: int, cp_size: int, cp_rank: int) -> "SequenceLayout":
        """Return the layout with the plan of a rank. Raises LayoutError if no plan exists."""
        plan = make_plan(seq_length, chunk_size, self.documents, cp_size, cp_rank)
        return replace(self, plan=plan, chunk_ids=chunk_ids(plan.chunk_lengths))

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Return the document bounds, (n_docs + 1,) int32 on the CPU, or None."""
        return None if self.documents is None else torch.tensor(self.documents, dtype=torch.int32)

    def pin_memory(self) -> "SequenceLayout":
        """Return a copy in pinned memory."""
        return self if self.chunk_ids is None else replace(self, chunk_ids=self.chunk_ids.pin_memory())

    def to(self, device: torch.device) -> "SequenceLayout":
        """Return a copy on a device. Copies from pinned memory are asynchronous."""
        if self.chunk_ids is None:
            return self
        return replace(self, chunk_ids=self.chunk_ids.to(device, non_blocking=True))


def take_local(tensor: Tensor, cp_size: int, cp_rank: int, dim: int) -> Tensor:
    """Return a rank's two slices, concatenated, of a tensor that holds the whole sequence along ``dim``."""
    if cp_size == 1:
        return tensor
    edges = slice_bounds(tensor.shape[dim], cp_size)
    parts = [tensor.narrow(dim, edges[i], edges[i + 1] - edges[i]) for i in local_slices(cp_size, cp_rank)]
    return torch.cat(parts, dim=dim)


def in_sequence_order(gathered: Tensor, cp_size: int) -> Tensor:
    """Return the sequence in order, given the ranks' slices concatenated by rank along the first dimension."""
    if cp_size == 1:
        return gathered
    slices = gathered.chunk(2 * cp_size, dim=0)
    place = {index: at for at, index in enumerate(i for rank in range(cp_size) for i in local_slices(cp_size, rank))}
    return torch.cat([slices[place[index]] for index in range(2 * cp_size)])
