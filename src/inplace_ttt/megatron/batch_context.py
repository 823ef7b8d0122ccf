"""Hold the context of a micro batch, passed through Megatron's layers as packed_seq_params."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from inplace_ttt.ttt.layout import SequenceLayout


@dataclass
class BatchContext(PackedSeqParams):
    """Hold the sequence layout of a micro batch, device copies of its tables, and data saved for the recompute.

    Tensors stay (s, b, h), in zigzag order over the sequence. With n context-parallel ranks, Megatron's own packed
    format cuts every document into 2n slices, and so cuts chunks. Here the whole sequence is cut into 2n slices, and
    documents are described by their bounds.
    """

    layout: SequenceLayout = field(default_factory=SequenceLayout)
    tables: dict[tuple, Tensor] = field(default_factory=dict, repr=False, compare=False)
    # by module: what its forward (without gradients) saves for its recompute (with gradients)
    recompute: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def documents(self) -> tuple[int, ...] | None:
        """Return the document bounds in the whole sequence, or None if each row is one document."""
        return self.layout.documents

    def table(self, key, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Return the device copy of the CPU tensor that ``make`` returns. All layers share one copy per ``key``."""
        if (key, device) not in self.tables:
            self.tables[key, device] = make().to(device, non_blocking=True)
        return self.tables[key, device]
