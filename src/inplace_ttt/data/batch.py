"""Collate samples and micro batches of one rank, with their sequence layout."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from inplace_ttt.ttt.layout import SequenceLayout, take_local


@dataclass
class Sample:
    """Hold one sequence of ``data.seq_length`` tokens."""

    tokens: Tensor  # (s,) int64 token IDs
    labels: Tensor  # (s,) int64: the next token
    loss_mask: Tensor  # (s,) fp32: 1 if the label counts in the loss
    documents: tuple[int, ...] | None  # document bounds, from 0 to s; None: one document
    source: int = 0  # index in data.sources or data.validation


@dataclass
class MicroBatch:
    """Hold the model inputs of one rank: zigzag slices of the sequence under context parallelism.

    The workers of the data loader create it, so it can be pickled and pinned and needs no process group.
    """

    tokens: Tensor  # (b, s) int64 token IDs; s is local to the rank
    labels: Tensor  # (b, s)
    loss_mask: Tensor  # (b, s)
    position_ids: Tensor  # (b, s), restart at 0 in each document
    sources: Tensor  # (b, s) int16, source of each token
    layout: SequenceLayout

    @classmethod
    def collate(cls, samples: list[Sample], cp_size: int, cp_rank: int, chunk_size: int | None) -> "MicroBatch":
        """Combine samples on the CPU.

        Samples without document bounds are stacked to rows; samples with bounds are concatenated to one row.
        ``chunk_size``: tokens per chunk of the TTT layers; None: no TTT layers, so no plan is made.
        """
        of_each = [sample.documents for sample in samples if sample.documents is not None]
        packed = bool(of_each)
        tokens, labels, loss_mask = (
            torch.cat([getattr(sample, key) for sample in samples])[None]
            if packed
            else torch.stack([getattr(sample, key) for sample in samples])
            for key in ("tokens", "labels", "loss_mask")
        )
        sources = torch.tensor([sample.source for sample in samples], dtype=torch.int16)
        sources = sources.repeat_interleave(samples[0].tokens.shape[0]).view_as(tokens)
        documents: tuple[int, ...] | None = None
        positions = torch.arange(tokens.shape[1])
        if packed:
            offset, bounds = 0, [0]
            for own in of_each:
                bounds += [offset + bound for bound in own[1:]]
                offset += own[-1]
            documents = tuple(bounds)
            starts = torch.tensor(documents[:-1])
            positions = positions - torch.repeat_interleave(starts, torch.diff(torch.tensor(documents)))
        layout = SequenceLayout() if documents is None else SequenceLayout(documents)
        if chunk_size is not None:
            layout = layout.with_plan(tokens.shape[1], chunk_size, cp_size, cp_rank)
        parts = (tokens, labels, loss_mask, positions.expand_as(tokens), sources)
        local = [take_local(part, cp_size, cp_rank, dim=1).contiguous() for part in parts]
        return cls(local[0], local[1], local[2], local[3], local[4], layout)

    def pin_memory(self) -> "MicroBatch":
        """Return a copy in pinned memory, which can be copied to a GPU asynchronously."""
        return replace(self, **{one.name: getattr(self, one.name).pin_memory() for one in fields(self)})

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on a device."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "layout"}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return MicroBatch(**moved, layout=self.layout.to(device))
