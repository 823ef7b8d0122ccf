"""Sum the losses of tokens over ranges of their position in the document."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

EQUAL_RANGES = 8  # number of ranges if no edges are given


@dataclass(frozen=True)
class PositionRanges:
    """Hold the ranges [edges[i], edges[i + 1]) of token positions in a document, counted from 0."""

    edges: tuple[int, ...]

    @classmethod
    def equal(cls, length: int) -> "PositionRanges":
        """Return ``EQUAL_RANGES`` ranges from 0 to ``length``, of equal size up to rounding; fewer if it is shorter."""
        count = min(EQUAL_RANGES, length)
        return cls(tuple(length * number // count for number in range(count + 1)))

    def __len__(self) -> int:
        return len(self.edges) - 1

    def sums(self, positions: Tensor, losses: Tensor, counts: Tensor) -> Tensor:
        """Return (ranges, 2) fp64: the summed loss and the number of tokens in each range.

        Args:
            positions, losses, counts: tensors of the same shape; tokens with ``counts`` False are left out.
        """
        edges = torch.tensor(self.edges, device=positions.device)
        place = torch.bucketize(positions[counts], edges, right=True)  # 0: before the first edge
        sums = torch.zeros(len(self.edges) + 1, 2, dtype=torch.float64, device=losses.device)
        values = torch.stack([losses[counts].double(), torch.ones_like(losses[counts], dtype=torch.float64)], dim=1)
        return sums.index_add_(0, place, values)[1:-1]

    def records(self, sums: list[list[float]]) -> list[dict]:
        """Return edges, number of tokens and mean loss of each range that contains tokens."""
        return [
            {"from": start, "to": stop, "tokens": int(tokens), "loss": loss / tokens}
            for (start, stop), (loss, tokens) in zip(itertools.pairwise(self.edges), sums, strict=True)
            if tokens
        ]
