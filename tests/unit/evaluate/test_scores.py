import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score, roc_auc_score

from panfm.evaluate.scores import auc, draw_counts, interval, r2


def ones(n):
    return np.ones((1, n))


def test_auc_by_hand_with_a_tie():
    scores = np.array([0.1, 0.4, 0.4, 0.8])
    positive = np.array([False, True, False, True])
    assert auc(scores, positive, ones(4))[0] == pytest.approx(3.5 / 4)


@pytest.mark.parametrize("positive", [[True, True], [False, False], []])
def test_auc_of_one_class_is_nan(positive):
    positive = np.array(positive, dtype=bool)
    assert np.isnan(auc(np.arange(len(positive), dtype=float), positive, ones(len(positive)))[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_auc_with_counts_equals_sklearn_on_the_repeated_subjects(data):
    n = data.draw(st.integers(2, 25))
    scores = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n)), dtype=float)
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    counts = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    repeated, truth = np.repeat(scores, counts), np.repeat(positive, counts)
    got = auc(scores, positive, counts[None].astype(float))[0]
    if len(set(truth)) < 2:
        assert np.isnan(got)
    else:
        assert got == pytest.approx(roc_auc_score(truth, repeated))


def test_r2_with_counts_equals_sklearn_on_the_repeated_subjects():
    generator = np.random.default_rng(0)
    predicted, truth = generator.normal(size=(2, 40))
    counts = generator.integers(0, 4, size=40)
    got = r2(predicted, truth, np.stack([np.ones(40), counts]))
    assert got[0] == pytest.approx(r2_score(truth, predicted))
    assert got[1] == pytest.approx(r2_score(np.repeat(truth, counts), np.repeat(predicted, counts)))


def test_r2_of_a_constant_truth_is_nan():
    assert np.isnan(r2(np.zeros(3), np.ones(3), ones(3))[0])


def test_counts_start_with_everybody_once_and_keep_the_number():
    counts = draw_counts(20, 50, seed=3)
    assert (counts[0] == 1).all()
    assert (counts.sum(axis=1) == 20).all()
    assert np.array_equal(counts, draw_counts(20, 50, seed=3))
    assert not np.array_equal(counts, draw_counts(20, 50, seed=4))


def test_interval_leaves_untold_labels_out():
    values = np.array([[0.6, np.nan, 0.8], [0.5, np.nan, 0.7], [0.7, 0.1, 0.9]])
    found = interval(values)
    assert found.value == pytest.approx(0.7)
    assert found.low < found.value


def test_interval_of_nothing_is_nan():
    assert np.isnan(interval(np.full((5, 2), np.nan)).value)
    assert np.isnan(interval(np.empty((5, 0))).value)
    assert np.isnan(interval(np.array([[0.5]])).low)  # no resamples


def test_interval_covers_the_true_auc():
    """Normal scores one sd apart: the true AUC is Phi(1/sqrt 2) = .7602; 95 % intervals cover it about as often."""
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(150):
        positive = np.arange(120) < 40
        scores = generator.normal(size=120) + positive
        found = interval(auc(scores, positive, draw_counts(120, 150, seed=trial))[:, None])
        hits += found.low <= 0.7602 <= found.high
    assert 0.88 <= hits / 150 <= 0.99
