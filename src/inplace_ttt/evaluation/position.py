"""Loss by position: how well tokens are predicted that have so many tokens of their document before them."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

EQUAL_RANGES = 8  # where no edges are named


@dataclass(frozen=True)
class PositionRanges:
    """Ranges [edges[i], edges[i + 1]) of positions in the document, counted from 0."""

    edges: tuple[int, ...]

    @classmethod
    def equal(cls, length: int) -> "PositionRanges":
        """Return ranges of equal size, as far as a length allows, from 0 to it."""
        count = min(EQUAL_RANGES, length)
        return cls(tuple(length * number // count for number in range(count + 1)))

    def __len__(self) -> int:
        return len(self.edges) - 1

    def sums(self, positions: Tensor, losses: Tensor, counts: Tensor) -> Tensor:
        """Return (ranges, 2) fp64: the summed loss and the number of tokens in each range.

        Args:
            positions, losses, counts: of one shape; tokens where ``counts`` is False are left out.
        """
        edges = torch.tensor(self.edges, device=positions.device)
        place = torch.bucketize(positions[counts], edges, right=True)  # 0: before the first edge
        sums = torch.zeros(len(self.edges) + 1, 2, dtype=torch.float64, device=losses.device)
        values = torch.stack([losses[counts].double(), torch.ones_like(losses[counts], dtype=torch.float64)], dim=1)
        return sums.index_add_(0, place, values)[1:-1]

    def records(self, sums: list[list[float]]) -> list[dict]:
        """Return for each range that holds tokens: its edges, the number of tokens, their mean loss."""
        return [
            {"from": start, "to": stop, "tokens": int(tokens), "loss": loss / tokens}
            for (start, stop), (loss, tokens) in zip(itertools.pairwise(self.edges), sums, strict=True)
            if tokens
        ]
