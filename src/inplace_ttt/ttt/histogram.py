"""Count histograms of update ratios: norm of a chunk's update divided by the norm of the down-projection.

Bins have equal width on a logarithmic scale. Counts are integers, so their sum over ranks does not depend on the
parallel layout.
"""

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = -8, 2  # exponents of ten
PER_DECADE = 16  # bins per factor of ten
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}  # names in metrics and in exported models
SCALE = dict(lowest=LOWEST, highest=HIGHEST, per_decade=PER_DECADE)  # as stored in files
BINS = (HIGHEST - LOWEST) * PER_DECADE + 2  # including one bin below the lowest edge and one above the highest


def edges(device: torch.device | None = None) -> Tensor:
    """Return the bin edges in ascending order, (BINS - 1,) fp64."""
    return torch.logspace(LOWEST, HIGHEST, BINS - 1, dtype=torch.float64, device=device)


def count(ratios: Tensor) -> Tensor:
    """Return the number of ratios in each bin, (BINS,) int64; ratios that are not finite count in the last bin."""
    bins = torch.bucketize(ratios.double().flatten().nan_to_num(math.inf), edges(ratios.device), right=True)
    counts = torch.zeros(BINS, dtype=torch.int64, device=ratios.device)
    return counts.index_add_(0, bins, torch.ones_like(bins))


def quantile(counts: list[int], q: float) -> float:
    """Return the quantile ``q`` (0 to 1) of the counted ratios, interpolated inside its bin.

    Ratios in the first bin count as 0, ratios in the last bin as infinity. Returns nan if there are no counts.
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
