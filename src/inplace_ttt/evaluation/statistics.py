"""Compute confidence intervals of scores: percentile bootstrap, paired if two models have the same samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL, RESAMPLES, SEED = 0.95, 10_000, 0
MIN_SAMPLES = 10  # samples per group; with fewer the bootstrap is unreliable, and no interval is given


@dataclass(frozen=True)
class Interval:
    """Hold a mean and the bounds of its confidence interval."""

    mean: float
    low: float | None  # lower bound; None: fewer than ``MIN_SAMPLES`` samples in a group
    high: float | None  # upper bound; None like ``low``
    samples: int  # number of samples of all groups
    paired: bool = True  # for a difference: both models have the same samples

    def excludes_zero(self, digits: int) -> bool:
        """Return True if zero is outside the interval, also after rounding the bounds to ``digits`` decimal places."""
        if self.low is None or self.high is None:
            return False
        return round(self.low, digits) > 0 or round(self.high, digits) < 0


def _interval(mean: float, resampled: np.ndarray, groups: Sequence[np.ndarray], level: float, paired: bool) -> Interval:
    samples = sum(group.size for group in groups)
    if min(group.size for group in groups) < MIN_SAMPLES:
        return Interval(float(mean), None, None, samples, paired)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean), float(low), float(high), samples, paired)


def mean_interval(groups: Sequence[Sequence[float]], level: float = LEVEL) -> Interval:
    """Return the unweighted mean of the group means with a bootstrap interval.

    Samples are resampled with replacement within each group, so all groups have the same weight: RULER's score is the
    mean over its tasks, whatever their numbers of samples. If all samples are equal, the interval has zero width.

    Args:
        groups: scores of each task.
        level: confidence level.

    Raises ValueError if there is no group or a group is empty.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError("a mean needs at least one sample in each group")
    generator = np.random.default_rng(SEED)
    means = np.zeros(RESAMPLES)
    for array in arrays:
        means += array[generator.integers(array.size, size=(RESAMPLES, array.size))].mean(axis=1)
    return _interval(np.mean([array.mean() for array in arrays]), means / len(arrays), arrays, level, True)


def difference_interval(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], level: float = LEVEL
) -> Interval:
    """Return the mean of second - first with a paired bootstrap interval.

    Args:
        first, second: scores of two models for each task; sample i of a group is the same for both.
        level: confidence level.

    Raises ValueError if the groups differ in size.
    """
    if [len(group) for group in first] != [len(group) for group in second]:
        raise ValueError("a paired difference needs the same samples of the same tasks for both models")
    return mean_interval([np.subtract(b, a) for a, b in zip(first, second, strict=True)], level)


def ratio_interval(sums: Sequence[float], weights: Sequence[float], level: float = LEVEL) -> Interval:
    """Return sum(sums) / sum(weights), such as the loss per token, with a bootstrap interval over documents.

    Args:
        sums: one value per document, such as its summed loss, or the difference of two models.
        weights: one value per document, such as its tokens; documents of weight 0 are left out.
        level: confidence level.

    Raises ValueError if no document has a positive weight.
    """
    top, bottom = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    keep = bottom > 0
    top, bottom = top[keep], bottom[keep]
    if not top.size:
        raise ValueError("a ratio needs at least one sample")
    drawn = np.random.default_rng(SEED).integers(top.size, size=(RESAMPLES, top.size))
    ratios = top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1)
    return _interval(top.sum() / bottom.sum(), ratios, [top], level, True)


def unpaired_interval(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], level: float = LEVEL
) -> Interval:
    """Return mean(second) - mean(first) with a bootstrap interval, for models with different samples.

    Args:
        first, second: scores of two models for each task.
        level: confidence level.
    """
    generator, means, arrays = np.random.default_rng(SEED), [], []
    for groups in (first, second):
        total = np.zeros(RESAMPLES)
        for group in groups:
            array = np.asarray(group, dtype=np.float64)
            arrays.append(array)
            total += array[generator.integers(array.size, size=(RESAMPLES, array.size))].mean(axis=1)
        means.append(total / len(groups))
    mean = np.mean([np.mean(group) for group in second]) - np.mean([np.mean(group) for group in first])
    return _interval(mean, means[1] - means[0], arrays, level, False)
