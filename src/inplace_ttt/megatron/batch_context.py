"""The context of a micro batch, which travels through Megatron's layers in the place of packed_seq_params."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from inplace_ttt.ttt.layout import SequenceLayout


@dataclass
class BatchContext(PackedSeqParams):
    """The layout of a micro batch, copies of its tables on the device, and what a forward leaves for its recompute.

    Tensors stay (s, b, h), zigzag over the sequence. Megatron's own packed format cuts every document into 2n slices,
    and chunks with it; here the whole sequence is cut, and documents are known by their bounds.
    """

    layout: SequenceLayout = field(default_factory=SequenceLayout)
    tables: dict[tuple, Tensor] = field(default_factory=dict, repr=False, compare=False)
    # by module: what its forward, which runs without gradients, leaves for its recompute, which runs with them
    recompute: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def documents(self) -> tuple[int, ...] | None:
        """Return the bounds of the documents in the whole sequence, or None where each row is one."""
        return self.layout.documents

    def table(self, key, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Return the device's copy, one for all layers, of what ``make`` makes on the CPU."""
        if (key, device) not in self.tables:
            self.tables[key, device] = make().to(device, non_blocking=True)
        return self.tables[key, device]
