"""Samples and micro batches: packed and planned in integers, for the rank that reads them."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from inplace_ttt.ttt.layout import SequenceLayout, take_local


@dataclass
class Sample:
    """One sequence of ``data.seq_length`` tokens."""

    tokens: Tensor  # (s,) int64
    labels: Tensor  # (s,) int64: the token that follows
    loss_mask: Tensor  # (s,) fp32: 1 where the label counts
    documents: tuple[int, ...] | None  # bounds, from 0 to s; None: one document
    source: int = 0  # the number of the data's source


@dataclass
class MicroBatch:
    """Hold what a rank feeds to the model: zigzag slices of the sequence under context parallelism.

    It is made in the loader's workers: it pickles, pins its memory, and knows no process group.
    """

    tokens: Tensor  # (b, s)
    labels: Tensor  # (b, s)
    loss_mask: Tensor  # (b, s)
    position_ids: Tensor  # (b, s), from 0 in each document
    sources: Tensor  # (b, s) int16, of each token
    layout: SequenceLayout

    @classmethod
    def collate(cls, samples: list[Sample], cp_size: int, cp_rank: int, chunk_size: int | None) -> "MicroBatch":
        """Put samples together, on the CPU.

        Samples without document bounds become rows; samples with them are concatenated in a single row.
        ``chunk_size``: tokens per chunk of the TTT layers. None: there are none, and no plan is made.
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
        """Return a copy in pinned memory, from which copies to a GPU do not wait."""
        return replace(self, **{one.name: getattr(self, one.name).pin_memory() for one in fields(self)})

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on a device."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "layout"}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return MicroBatch(**moved, layout=self.layout.to(device))
