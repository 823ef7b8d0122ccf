"""Histograms of update norms: counts, quantiles, and values at the ends."""

import math

import torch

from inplace_ttt.ttt import histogram


def test_quantiles_are_right_to_a_bin():
    ratios = torch.exp(torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 6)
    counts = histogram.count(ratios)
    assert counts.dtype == torch.int64 and int(counts.sum()) == 20_000
    for q in (0.01, 0.5, 0.99):
        found, expected = histogram.quantile(counts.tolist(), q), ratios.quantile(q).item()
        assert abs(math.log10(found / expected)) < 0.5 / histogram.PER_DECADE


def test_every_ratio_is_counted():
    counts = histogram.count(torch.tensor([0.0, 1e-9, 1e3, math.inf, math.nan, 1e-3]))
    assert counts[0] == 2 and counts[-1] == 3 and int(counts.sum()) == 6
    assert histogram.quantile(counts.tolist(), 0.1) == 0.0 and histogram.quantile(counts.tolist(), 1.0) == math.inf
    assert math.isnan(histogram.quantile([0] * histogram.BINS, 0.5))


def test_counts_of_parts_sum_to_those_of_the_whole():
    ratios = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    parts = sum(histogram.count(part) for part in ratios.split(37))
    assert torch.equal(parts, histogram.count(ratios))
