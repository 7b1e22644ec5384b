"""AUC and R2, as a point and over bootstrap resamples of the test subjects.

A resample is a row of counts: how often each test subject was drawn. The same counts serve all labels and all arms, so
that differences between them are paired. The point estimate is the resample in which everybody counts once.

Shape legend: R resamples, N test subjects, L labels.
"""

import warnings

import numpy as np
from numpy.typing import NDArray

from panfm.evaluate.result import Interval
from panfm.seeds import numpy_generator

Floats = NDArray[np.float64]


def draw_counts(num_subjects: int, num_resamples: int, seed: int) -> Floats:
    """Counts [1 + num_resamples, N]: first row all ones (the point estimate), then draws with replacement."""
    generator = numpy_generator(seed, "bootstrap")
    draws = generator.multinomial(num_subjects, np.full(num_subjects, 1 / num_subjects), size=num_resamples)
    return np.vstack([np.ones((1, num_subjects)), draws])


def auc(scores_N: Floats, positive_N: NDArray[np.bool_], counts_RN: Floats) -> Floats:
    """Area under the ROC curve per resample [R]: P(score of a positive > of a negative), ties count half.

    Guarantees:
        one class: NaN in a resample without a positive or without a negative.
    """
    if not len(scores_N):
        return np.full(len(counts_RN), np.nan)
    tied, starts = _tie_starts(scores_N)
    positives = np.add.reduceat(counts_RN[:, tied] * positive_N[tied], starts, axis=1)
    negatives = np.add.reduceat(counts_RN[:, tied] * ~positive_N[tied], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    wins = (positives * below).sum(axis=1)
    area: Floats = np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return area


def r2(predicted_N: Floats, truth_N: Floats, counts_RN: Floats) -> Floats:
    """Share of the test variance that is explained, per resample [R]; 0 is as good as the test mean.

    Guarantees:
        no variance: NaN in a resample in which the truth does not vary.
    """
    total = counts_RN.sum(axis=1)
    mean = np.divide(counts_RN @ truth_N, total, out=np.zeros_like(total), where=total > 0)
    spread = np.einsum("rn,rn->r", counts_RN, (truth_N - mean[:, None]) ** 2)
    missed = counts_RN @ (predicted_N - truth_N) ** 2
    explained: Floats = 1 - np.divide(missed, spread, out=np.full(len(spread), np.nan), where=spread > 0)
    return explained


def interval(values_RL: Floats) -> Interval:
    """Mean over labels (columns) of the point estimate (row 0), and the 2.5 and 97.5 percentiles over resamples.

    Labels that cannot be told are left out of the mean; without any the answer is NaN.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # mean of nothing is NaN, as promised
        means = np.nanmean(values_RL, axis=1) if values_RL.size else np.full(len(values_RL), np.nan)
        low, high = np.nanpercentile(means[1:], [2.5, 97.5]) if len(means) > 1 else (np.nan, np.nan)
    return Interval(float(means[0]), float(low), float(high))


def _tie_starts(scores_N: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ascending order of the scores, and where in it each run of equal scores begins."""
    order = np.argsort(scores_N, kind="stable")
    ascending = scores_N[order]
    starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    return order, starts
