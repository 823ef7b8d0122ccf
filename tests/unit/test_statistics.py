"""Intervals against what is known: binomial scores, groups of unlike size, two models on the same samples."""

import math
import random

import numpy as np
import pytest

from inplace_ttt.evaluation.statistics import difference_interval, mean_interval, ratio_interval, unpaired_interval


@pytest.mark.parametrize(("right", "count"), [(250, 500), (80, 100), (490, 500)])
def test_a_binomial_share(right, count):
    interval = mean_interval([[1.0] * right + [0.0] * (count - right)])
    share = right / count
    half = 1.96 * math.sqrt(share * (1 - share) / count)
    assert interval.mean == share and interval.samples == count
    assert interval.low == pytest.approx(share - half, abs=0.15 * half)
    assert interval.high == pytest.approx(share + half, abs=0.15 * half)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = random.Random(0)
    covered = 0
    for _ in range(200):
        interval = mean_interval([[float(rng.random() < 0.7) for _ in range(100)]])
        covered += interval.low <= 0.7 <= interval.high
    assert 180 <= covered <= 199  # 95% of 200; the bootstrap is a little narrow


def test_tasks_weigh_alike():
    interval = mean_interval([[1.0] * 10, [0.0] * 1000])
    assert interval.mean == interval.low == interval.high == 0.5 and interval.samples == 1010


def test_pairing_finds_a_small_difference():
    rng = np.random.default_rng(0)
    hard = rng.random(500)  # most of the variance is the samples'
    first = (hard < 0.7).astype(float)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:10]] = 1.0
    paired = difference_interval([first], [second])
    assert paired.mean == pytest.approx(0.02) and paired.excludes_zero(4)
    apart = mean_interval([first]), mean_interval([second])
    assert apart[0].high > apart[1].low  # intervals of their own overlap
    assert not difference_interval([first], [first]).excludes_zero(4)
    with pytest.raises(ValueError, match="the same samples"):
        difference_interval([[1.0]], [[1.0, 0.0]])


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="at least one sample"):
        mean_interval([[1.0], []])


def test_a_loss_per_token_weighs_documents_by_their_tokens():
    found = ratio_interval([10.0, 90.0, 0.0], [10.0, 30.0, 0.0])
    assert found.mean == 2.5 and found.samples == 2 and found.low is None and not found.excludes_zero(4)
    rng = random.Random(0)
    tokens = [rng.choice([100, 400]) for _ in range(300)]
    losses = [n * rng.gauss(3.0, 0.5) for n in tokens]
    found = ratio_interval(losses, tokens)
    ratio = sum(losses) / sum(tokens)
    # the delta method's standard error of a ratio
    residuals = [loss - ratio * n for loss, n in zip(losses, tokens, strict=True)]
    half = 1.96 * math.sqrt(sum(r * r for r in residuals)) / sum(tokens)
    assert found.low == pytest.approx(ratio - half, abs=0.15 * half)
    assert found.high == pytest.approx(ratio + half, abs=0.15 * half)


def test_an_unpaired_difference_of_binomials():
    first, second = [[1.0] * 60 + [0.0] * 40], [[1.0] * 160 + [0.0] * 40]
    found = unpaired_interval(first, second)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100 + 0.8 * 0.2 / 200)
    assert found.mean == pytest.approx(0.2) and found.samples == 300 and found.excludes_zero(1) and not found.paired
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
