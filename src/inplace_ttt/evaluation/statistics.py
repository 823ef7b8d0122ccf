"""Scores with intervals: percentile bootstrap over samples, paired where two models answered the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL, RESAMPLES, SEED = 0.95, 10_000, 0


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float
    samples: int  # of all groups

    @property
    def excludes_zero(self) -> bool:
        """Tell whether zero lies outside of the interval."""
        return not self.low <= 0.0 <= self.high


def mean_interval(groups: Sequence[Sequence[float]], level: float = LEVEL) -> Interval:
    """Return the plain mean of the groups' means (of one group: its mean) with a bootstrap interval.

    Samples are drawn anew with replacement inside each group, so groups keep their weights: RULER's score is the mean
    of its tasks, whatever their numbers of samples. With one sample, or samples that are all alike, the interval has no
    width: the bootstrap knows no other outcome.

    Args:
        groups: scores by task.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError("a mean needs at least one sample in each group")
    generator = np.random.default_rng(SEED)
    means = np.zeros(RESAMPLES)
    for array in arrays:
        means += array[generator.integers(array.size, size=(RESAMPLES, array.size))].mean(axis=1)
    low, high = np.quantile(means / len(arrays), [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.mean([array.mean() for array in arrays]))
    return Interval(mean, float(low), float(high), sum(array.size for array in arrays))


def difference_interval(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], level: float = LEVEL
) -> Interval:
    """Return the mean of second - first with a paired bootstrap interval.

    Args:
        first, second: scores of two models by task; sample i of a group is the same for both.
    """
    if [len(group) for group in first] != [len(group) for group in second]:
        raise ValueError("two models are compared on the same samples of the same tasks")
    return mean_interval([np.subtract(b, a) for a, b in zip(first, second, strict=True)], level)


def ratio_interval(sums: Sequence[float], weights: Sequence[float], level: float = LEVEL) -> Interval:
    """Return sum(sums) / sum(weights), such as the loss per token of documents, with a bootstrap interval over them.

    Args:
        sums: of each document, such as its loss; of two models, the difference.
        weights: of each document, such as its tokens.
    """
    top, bottom = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    keep = bottom > 0
    top, bottom = top[keep], bottom[keep]
    if not top.size:
        raise ValueError("a ratio needs at least one sample")
    drawn = np.random.default_rng(SEED).integers(top.size, size=(RESAMPLES, top.size))
    ratios = top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high), int(top.size))


def unpaired_interval(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], level: float = LEVEL
) -> Interval:
    """Return mean(second) - mean(first) of groups where the two models answered different samples."""
    generator, means = np.random.default_rng(SEED), []
    for groups in (first, second):
        total = np.zeros(RESAMPLES)
        for group in groups:
            array = np.asarray(group, dtype=np.float64)
            total += array[generator.integers(array.size, size=(RESAMPLES, array.size))].mean(axis=1)
        means.append(total / len(groups))
    low, high = np.quantile(means[1] - means[0], [(1 - level) / 2, (1 + level) / 2])
    mean = np.mean([np.mean(group) for group in second]) - np.mean([np.mean(group) for group in first])
    return Interval(float(mean), float(low), float(high), sum(map(len, first)) + sum(map(len, second)))
