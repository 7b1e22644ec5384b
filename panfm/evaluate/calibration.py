"""Measures calibration and agreement of predictions, as a point and over bootstrap resamples of the test subjects.

Shape legend: R resamples, N test subjects.
"""

import numpy as np
from numpy.typing import NDArray

from panfm.evaluate.scores import Floats

_BINS = 10


def calibration_error(probabilities: Floats, is_yes: NDArray[np.bool_], counts: Floats) -> Floats:
    """Expected calibration error [R]: distance of the mean probability from the share of yes, in ten bins of equal
    width, weighted by their subjects.

    Args:
        probabilities, is_yes: [N]
        counts: [R, N], see `draw_counts`.
    Source:
        Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, equation 3.
    """
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    surplus = np.eye(_BINS)[bins] * (probabilities - is_yes)[:, None]
    error: Floats = np.abs(counts @ surplus).sum(axis=1) / np.maximum(counts.sum(axis=1), 1.0)
    return error if len(probabilities) else np.full(len(counts), np.nan)


def brier_score(probabilities: Floats, is_yes: NDArray[np.bool_], counts: Floats) -> Floats:
    """Mean squared difference of probability and outcome, per resample [R]; 0 is best."""
    if not len(probabilities):
        return np.full(len(counts), np.nan)
    score: Floats = counts @ (probabilities - is_yes) ** 2 / np.maximum(counts.sum(axis=1), 1.0)
    return score


def weighted_kappa(predicted: Floats, truth: Floats, counts: Floats) -> Floats:
    """Cohen's kappa of grades with quadratic weights, per resample [R]: 1 is agreement, 0 is chance.

    Args:
        predicted, truth: Grades [N], as numbers.
        counts: [R, N], see `draw_counts`.
    Guarantees:
        no chance: NaN in a resample in which both have one and the same grade throughout.
    """
    total = np.maximum(counts.sum(axis=1), 1.0)

    def mean(values: Floats) -> Floats:
        means: Floats = counts @ values / total
        return means

    by_chance = mean(predicted**2) + mean(truth**2) - 2.0 * mean(predicted) * mean(truth)
    missed = mean((predicted - truth) ** 2)
    kappa: Floats = 1.0 - np.divide(missed, by_chance, out=np.full(len(missed), np.nan), where=by_chance > 1e-12)
    return kappa
