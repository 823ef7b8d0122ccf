"""Scores with intervals: percentile bootstrap over samples, paired where two models answered the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL, RESAMPLES, SEED = 0.95, 10_000, 0
MIN_SAMPLES = 10  # samples of a group for which there is an interval: of fewer the bootstrap knows too little


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float | None  # None: too few samples for an interval (``LEAST``)
    high: float | None
    samples: int  # of all groups
    paired: bool = True  # of a difference: each sample is one of both models

    def excludes_zero(self, digits: int) -> bool:
        """Tell whether zero lies outside of the interval, also when rounded to so many digits."""
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
    """Return the plain mean of the groups' means (of one group: its mean) with a bootstrap interval.

    Samples are drawn anew with replacement inside each group, so groups keep their weights: RULER's score is the mean
    of its tasks, whatever their numbers of samples. Where samples are all alike the interval has no width, for the
    bootstrap knows no other outcome.

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
    return _interval(np.mean([array.mean() for array in arrays]), means / len(arrays), arrays, level, True)


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
    return _interval(top.sum() / bottom.sum(), ratios, [top], level, True)


def unpaired_interval(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], level: float = LEVEL
) -> Interval:
    """Return mean(second) - mean(first) of groups where the two models answered different samples."""
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
