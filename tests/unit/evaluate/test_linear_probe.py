import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from panfm.errors import DataError
from panfm.evaluate.linear_probe import auc_per_label, fit_classifiers, fit_regressors, one_class_notes, r2_per_label
from panfm.evaluate.probe_file import LinearProbe


def draw(n=200, d=6, labels=3, seed=0):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(n, d)) * 10.0 ** np.arange(-3, d - 3) + 5
    standard = (features - features.mean(0)) / features.std(0)
    logits = standard @ generator.normal(size=(d, labels))
    return features, (logits + generator.normal(size=(n, labels)) > 0).astype(float), logits


def test_classifier_equals_sklearn_per_label():
    features, targets, _ = draw()
    probe = fit_classifiers(features, targets, ["a", "b", "c"])
    standard = (features - features.mean(0)) / features.std(0)
    candidates = [
        LogisticRegression(C=c, max_iter=2000).fit(standard, targets[:, 1]).decision_function(standard)
        for c in (0.001, 0.01, 0.1, 1.0)
    ]
    assert any(np.allclose(probe.score(features)[:, 1], each, rtol=0.01, atol=0.02) for each in candidates)


def test_separable_label_is_read_perfectly_whatever_the_units():
    features, _, _ = draw()
    targets = (features[:, :1] > np.median(features[:, 0])).astype(float)
    probe = fit_classifiers(features, targets, ["a"])
    assert auc_per_label(probe.score(features), targets, np.ones((1, 200)))[0, 0] > 0.98


def test_noise_is_not_read():
    generator = np.random.default_rng(1)
    targets = generator.integers(0, 2, size=(400, 4)).astype(float)
    probe = fit_classifiers(generator.normal(size=(400, 20)), targets, list("abcd"))
    fresh = auc_per_label(probe.score(generator.normal(size=(400, 20))), targets, np.ones((1, 400)))
    assert abs(fresh.mean() - 0.5) < 0.06


def test_same_input_gives_the_same_bits():
    features, targets, _ = draw()
    first, second = (fit_classifiers(features, targets, list("abc")) for _ in range(2))
    assert np.array_equal(first.weights, second.weights)


def test_unknown_labels_leave_subjects_out_of_that_label_alone():
    features, targets, _ = draw()
    holed = targets.copy()
    holed[:50, 1] = np.nan
    garbage = features.copy()
    probe = fit_regressors(garbage, holed, list("abc"))
    whole = fit_regressors(features, targets, list("abc"))
    assert np.array_equal(probe.weights[:, 0], whole.weights[:, 0])
    assert not np.array_equal(probe.weights[:, 1], whole.weights[:, 1])


def test_one_class_in_the_fit_set_is_noted_and_nan():
    features, targets, _ = draw()
    targets[:, 2] = 1.0
    probe = fit_classifiers(features, targets, list("abc"))
    assert probe.notes == ("c: not probed, fit subjects are all of one class",)
    values = auc_per_label(probe.score(features), targets, np.ones((1, 200)))[0]
    assert np.isnan(values[2])
    assert np.isfinite(values[:2]).all()


def test_one_class_in_the_test_set_is_noted_and_nan():
    features, targets, _ = draw()
    probe = fit_classifiers(features, targets, list("abc"))
    test = targets[:30].copy()
    test[:, 0] = 0.0
    test[:, 1] = np.nan
    values = auc_per_label(probe.score(features[:30]), test, np.ones((1, 30)))[0]
    assert np.isnan(values[:2]).all()
    assert np.isfinite(values[2])
    assert [note.split(":")[0] for note in one_class_notes(test, list("abc"))] == ["a", "b"]


def test_regressor_recovers_a_linear_number_in_its_own_units():
    features, _, logits = draw()
    truth = logits * 300 + 1500
    probe = fit_regressors(features[:150], truth[:150], list("abc"))
    assert r2_per_label(probe.score(features[150:]), truth[150:], np.ones((1, 50))).min() > 0.99


def test_regressor_on_noise_falls_back_to_the_mean():
    generator = np.random.default_rng(2)
    truth = generator.normal(size=(300, 1)) + 7
    probe = fit_regressors(generator.normal(size=(300, 30)), truth, ["a"])
    assert abs(r2_per_label(probe.score(generator.normal(size=(300, 30))), truth, np.ones((1, 300)))[0, 0]) < 0.1


def test_constant_features_and_constant_targets_are_survived():
    probe = fit_regressors(np.zeros((20, 2)), np.full((20, 1), 4.0), ["a"])
    assert probe.score(np.zeros((3, 2))) == pytest.approx(np.full((3, 1), 4.0))
    targets = np.tile([[0.0], [1.0]], (10, 1))
    scores = fit_classifiers(np.zeros((20, 2)), targets, ["a"]).score(np.zeros((20, 2)))
    assert auc_per_label(scores, targets, np.ones((1, 20)))[0, 0] == 0.5


def test_a_feature_counts_no_further_than_its_reach():
    """By hand: (2 - 1) / 0.5 = 2 deviations -> 3 + 2 * 2; 198 deviations count as 4."""
    probe = LinearProbe(np.array([1.0]), np.array([0.5]), np.array([[2.0]]), np.array([3.0]), reach=4.0)
    assert probe.score(np.array([[2.0], [100.0], [-100.0]]))[:, 0].tolist() == [7.0, 11.0, -5.0]


def test_a_feature_that_hardly_varies_does_not_outweigh_the_others():
    """One of 16 background blocks holds a rounding error; a held-out subject has tissue there, 0.2 / 2.4e-9 deviations
    from the mean, which is 8e7."""
    truth = np.arange(16.0)[:, None]
    features = np.concatenate([truth, np.zeros((16, 1))], axis=1)
    features[15, 1] = 1e-8
    probe = fit_regressors(features, truth, ["a"])
    assert probe.reach == 4.0
    assert probe.scale[1] == pytest.approx(1e-8 * np.sqrt(1 / 16 * 15 / 16))
    strange = probe.score(np.array([[7.0, 0.0], [7.0, 0.2]]))[:, 0]
    assert strange[1] - strange[0] == pytest.approx(probe.weights[1, 0] * (4.0 + np.sqrt(1 / 15)))
    test = np.array([[3.0, 0.0], [7.0, 0.2], [12.0, 0.0]])
    assert r2_per_label(probe.score(test), test[:, :1], np.ones((1, 3)))[0, 0] > 0.9


def test_no_fit_subject_is_beyond_the_reach():
    features = np.zeros((48, 3))
    features[5] = 1e-9, 1.0, 1e9
    probe = fit_regressors(features, np.arange(48.0)[:, None], ["a"])
    assert np.abs((features - probe.centre) / probe.scale).max() == pytest.approx(np.sqrt(47))
    assert probe.reach > np.sqrt(47)


def test_no_labels_is_no_score():
    probe = fit_classifiers(np.zeros((20, 2)), np.empty((20, 0)), [])
    assert probe.score(np.zeros((3, 2))).shape == (3, 0)


def test_few_subjects_are_refused():
    with pytest.raises(DataError, match="9 fit subjects, expected at least 10"):
        fit_classifiers(np.zeros((9, 2)), np.zeros((9, 1)), ["a"])


def test_values_other_than_yes_and_no_are_refused():
    targets = np.zeros((20, 2))
    targets[3, 1] = 0.5
    with pytest.raises(DataError, match=r"label 'b': expected 0, 1 or empty \(got 0.5\)"):
        fit_classifiers(np.zeros((20, 2)), targets, ["a", "b"])


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="NaN or inf"):
        fit_regressors(np.full((20, 2), np.nan), np.zeros((20, 1)), ["a"])
