"""AUC and R2 of one site's patients, from a probe of the site's own."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.preprocessing import StandardScaler

from panfm.evaluate.label_sums import PENALTIES
from panfm.evaluate.site_score import cross_validated, enough_of, probed, scored

RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(60, 5))
SICK = (FEATURES[:, :1] + RANDOM.normal(size=(60, 1)) > 0).astype(float)


def test_a_score_by_hand():
    """Of four pairs of a sick and a well patient, three are in order."""
    score = scored(
        np.array([[0.9], [0.3], [0.5], [0.1]]), np.array([[1.0], [1], [0], [0]]), is_number=False, is_held_out=True
    )
    assert (score.metric, score.value, score.patients, score.is_held_out) == ("auc", 0.75, 4, True)
    assert 0.0 <= score.low <= 0.75 <= score.high <= 1.0


def test_a_probe_is_the_ridge_with_the_least_leave_one_out_error():
    train = np.arange(40)
    scaled = StandardScaler().fit(FEATURES[train])
    x, y = scaled.transform(FEATURES), SICK[:, 0]
    errors = [
        ((cross_val_predict(Ridge(alpha=penalty), x[train], y[train], cv=LeaveOneOut()) - y[train]) ** 2).sum()
        for penalty in PENALTIES
    ]
    expected = Ridge(alpha=PENALTIES[np.argmin(errors)]).fit(x[train], y[train]).predict(x)
    np.testing.assert_allclose(probed(FEATURES, SICK, train)[:, 0], expected, rtol=1e-8)


def test_scores_are_rounded_and_those_of_scikit_learn():
    predicted = cross_validated(FEATURES, SICK)
    score = scored(predicted, SICK, is_number=False, is_held_out=False)
    assert score.value == round(roc_auc_score(SICK, predicted), 2)
    assert score.value > 0.6
    number = FEATURES @ RANDOM.normal(size=(5, 1)) + RANDOM.normal(size=(60, 1))
    score = scored(cross_validated(FEATURES, number), number, is_number=True, is_held_out=False)
    assert (score.metric, score.value) == ("r2", round(r2_score(number, cross_validated(FEATURES, number)), 2))
    assert all(value == round(value, 2) for value in (score.value, score.low, score.high))


def test_labels_without_meaning_are_not_told_by_their_own_patients():
    """In-sample, so many features would tell any label."""
    noise = RANDOM.integers(0, 2, (60, 1)).astype(float)
    wide = RANDOM.normal(size=(60, 200))
    assert scored(cross_validated(wide, noise), noise, is_number=False, is_held_out=False).value < 0.75
    assert scored(probed(wide, noise, np.arange(60)), noise, is_number=False, is_held_out=False).value > 0.9


def test_predictions_far_off_are_told_no_finer_than_minus_one():
    score = scored(np.array([[1e9], [0.0]]), np.array([[1.0], [2.0]]), is_number=True, is_held_out=True)
    assert score.value == -1.0


@pytest.mark.parametrize(
    ("column", "floor", "is_enough"),
    [
        ([0, 0, 0, 1, 1], 2, True),
        ([0, 0, 0, 1, 1], 3, False),
        ([0, 0, 0, 0, 0], 1, False),
        ([1.5, 2.5, 3.5], 2, True),
        ([1.5, 1.5, 3.5], 2, False),
        ([], 1, False),
    ],
)
def test_a_score_stands_on_enough_patients_of_each_kind(column, floor, is_enough):
    assert enough_of(np.array(column, dtype=float)[:, None], floor).tolist() == [is_enough]
