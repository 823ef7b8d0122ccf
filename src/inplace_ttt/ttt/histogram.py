"""Histograms of update norms: how large chunks' updates are, over the norm of the down-projection.

Bins are spaced evenly on a logarithmic scale and counts are integers, so that their sum over ranks does not depend on
the parallel layout.
"""

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = -8, 2  # powers of ten
PER_DECADE = 16
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}  # that records and exported models name
SCALE = dict(lowest=LOWEST, highest=HIGHEST, per_decade=PER_DECADE)  # as files say it
BINS = (HIGHEST - LOWEST) * PER_DECADE + 2  # the first is below the lowest edge, the last above the highest


def edges(device: torch.device | None = None) -> Tensor:
    """Return (BINS - 1,) fp64, the bins' edges in rising order."""
    return torch.logspace(LOWEST, HIGHEST, BINS - 1, dtype=torch.float64, device=device)


def count(ratios: Tensor) -> Tensor:
    """Return (BINS,) int64, how many ratios fall into each bin; a ratio that is not finite falls into the last."""
    bins = torch.bucketize(ratios.double().flatten().nan_to_num(math.inf), edges(ratios.device), right=True)
    counts = torch.zeros(BINS, dtype=torch.int64, device=ratios.device)
    return counts.index_add_(0, bins, torch.ones_like(bins))


def quantile(counts: list[int], q: float) -> float:
    """Return the value below which a share ``q`` of the counted ratios lies, interpolated inside its bin.

    The first bin counts as 0, the last as infinity. No counts: nan.
    """
    total = sum(counts)
    if total == 0:
        return math.nan
    wanted, below = q * total, 0
    for number, number_in_bin in enumerate(counts):
        if number_in_bin and below + number_in_bin >= wanted:
            if number == 0:
                return 0.0
            if number == BINS - 1:
                return math.inf
            inside = (wanted - below) / number_in_bin
            return 10 ** (LOWEST + (number - 1 + inside) / PER_DECADE)
        below += number_in_bin
    return math.inf
