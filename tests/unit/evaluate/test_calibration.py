"""Calibration and agreement equal numbers worked out by hand, and those of scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, cohen_kappa_score

from panfm.evaluate.calibration import brier_score, calibration_error, weighted_kappa
from panfm.evaluate.scores import draw_counts

ONCE = np.ones((1, 4))


def test_the_calibration_error_by_hand():
    """Two bins of two: .15 and .1 for nobody, .9 and 1 for one of two."""
    probabilities, is_yes = np.array([0.15, 0.1, 0.9, 1.0]), np.array([False, False, True, False])
    assert calibration_error(probabilities, is_yes, ONCE) == pytest.approx([(2 * 0.125 + 2 * 0.45) / 4])
    assert calibration_error(np.array([0.0, 1.0, 1.0, 0.0]), np.array([False, True, True, False]), ONCE) == 0.0
    assert np.isnan(calibration_error(np.empty(0), np.empty(0, bool), np.ones((1, 0))))


def test_sure_and_wrong_is_worst():
    probabilities, is_yes = np.array([1.0, 1.0, 0.0, 0.0]), np.array([False, False, True, True])
    assert calibration_error(probabilities, is_yes, ONCE) == 1.0
    assert brier_score(probabilities, is_yes, ONCE) == 1.0
    assert np.isnan(brier_score(np.empty(0), np.empty(0, bool), np.ones((1, 0))))


def test_as_scikit_learn_has_them():
    random = np.random.default_rng(0)
    probabilities, is_yes = random.random(50), random.random(50) < 0.4
    grades = random.integers(0, 4, (2, 50)).astype(float)
    grades[1, :30] = grades[0, :30]
    for row in draw_counts(50, 4, 0):
        chosen = np.repeat(np.arange(50), row.astype(int))
        expected = brier_score_loss(is_yes[chosen], probabilities[chosen])
        assert brier_score(probabilities, is_yes, row[None])[0] == pytest.approx(expected)
        kappa = cohen_kappa_score(grades[0, chosen], grades[1, chosen], weights="quadratic")
        assert weighted_kappa(grades[0], grades[1], row[None])[0] == pytest.approx(kappa)
    assert np.isnan(weighted_kappa(np.ones(4), np.ones(4), ONCE)[0])
