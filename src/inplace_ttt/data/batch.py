"""What a sample and a micro batch are, and the part of a micro batch that a context-parallel rank sees."""

from dataclasses import dataclass

import torch
from torch import Tensor

from inplace_ttt.megatron.layout import SequenceLayout, take_local


@dataclass
class Sample:
    """One sequence of ``data.seq_length`` tokens."""

    tokens: Tensor  # (s,) int64
    labels: Tensor  # (s,) int64: the token that follows
    loss_mask: Tensor  # (s,) fp32: 1 where the label counts
    documents: tuple[int, ...] | None  # bounds, from 0 to s; None: one document


@dataclass
class MicroBatch:
    """The tensors that this rank feeds to the model; zigzag slices of the sequence under context parallelism."""

    tokens: Tensor  # (b, s)
    labels: Tensor  # (b, s)
    loss_mask: Tensor  # (b, s)
    position_ids: Tensor  # (b, s), from 0 in each document
    layout: SequenceLayout

    @classmethod
    def collate(cls, samples: list[Sample], cp_size: int, cp_rank: int, device: torch.device) -> "MicroBatch":
        """Samples without document bounds become rows; samples with them lie one after the other in a single row."""
        packed = samples[0].documents is not None
        tokens, labels, loss_mask = (
            torch.cat([getattr(sample, key) for sample in samples])[None]
            if packed
            else torch.stack([getattr(sample, key) for sample in samples])
            for key in ("tokens", "labels", "loss_mask")
        )
        documents = None
        positions = torch.arange(tokens.shape[1])
        if packed:
            offset, bounds = 0, [0]
            for sample in samples:
                bounds += [offset + bound for bound in sample.documents[1:]]
                offset += sample.tokens.shape[0]
            documents = tuple(bounds)
            starts = torch.tensor(documents[:-1])
            positions = positions - torch.repeat_interleave(starts, torch.diff(torch.tensor(documents)))
        parts = (tokens, labels, loss_mask, positions.expand_as(tokens))
        return cls(
            *(take_local(part, cp_size, cp_rank, dim=1).contiguous().to(device, non_blocking=True) for part in parts),
            SequenceLayout(documents=documents),
        )
