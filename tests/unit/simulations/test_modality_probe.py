import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from panfm.errors import DataError
from simulations.studies._modality_probe import Classed, leave_one_modality_out, probe_classes, probe_each_modality

NAMES = ("ct", "mr", "pet")


def make(seed, *, number=180, mirrored="", noise=0.3):
    """Three classes on a circle, the same in all modalities but one, where the circle is turned by a third."""
    random = np.random.default_rng(seed)
    classes, modality = random.integers(0, 3, number), np.array(NAMES)[np.arange(number) % 3]
    angle = 2 * np.pi / 3 * (classes + (modality == mirrored))
    features = np.stack([np.cos(angle), np.sin(angle)], axis=1) + noise * random.normal(size=(number, 2))
    return Classed(features, modality, classes)


def test_classes_that_modalities_share_are_found_across():
    fit, test = make(0), make(1)
    for found in (probe_each_modality(fit, test, NAMES), leave_one_modality_out(fit, test, NAMES)):
        assert set(found) == set(NAMES)
        assert min(score.accuracy for score in found.values()) > 0.9
        assert min(score.auc for score in found.values()) > 0.95
    assert probe_classes(fit, test).accuracy > 0.9


def test_a_modality_of_its_own_is_told_alone_but_not_across():
    fit, test = make(0, mirrored="pet"), make(1, mirrored="pet")
    assert probe_each_modality(fit, test, NAMES)["pet"].accuracy > 0.9
    assert leave_one_modality_out(fit, test, NAMES)["pet"].accuracy < 0.1


def test_scores_against_scikit_learn():
    fit, test = make(2, noise=0.8), make(3, noise=0.8)
    found = probe_classes(fit, test)
    shares = LogisticRegression(C=1.0).fit(fit.features, fit.classes).predict_proba(test.features)
    assert found.accuracy == pytest.approx((shares.argmax(axis=1) == test.classes).mean(), abs=0.03)
    above = [
        (shares[test.classes == each, each][:, None] > shares[test.classes != each, each]).mean() for each in range(3)
    ]
    assert found.auc == pytest.approx(np.mean(above), abs=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_scale_and_shift_of_features_change_nothing(scale):
    fit, test = make(0), make(1)
    moved = [Classed(scale * each.features + 5.0, each.modality, each.classes) for each in (fit, test)]
    assert probe_classes(*moved).accuracy == probe_classes(fit, test).accuracy


def test_a_class_without_fit_subjects_is_never_the_answer():
    fit, test = make(0), make(1)
    few = fit.only(fit.classes != 2)
    found = probe_classes(few, test)
    seen = test.classes != 2
    assert found.accuracy <= seen.mean()
    assert found.auc > 0.8


def test_a_class_that_the_test_subjects_lack_is_left_out_of_the_mean():
    fit, test = make(0), make(1)
    assert probe_classes(fit, test.only(test.classes != 2)).auc > 0.95
    assert np.isnan(probe_classes(fit, test.only(test.classes == 2)).auc)


def test_too_few_subjects_are_refused():
    fit = make(0, number=6)
    with pytest.raises(DataError, match="6 fit subjects of 3 classes, expected at least 10 of 2"):
        probe_classes(fit, make(1))
    with pytest.raises(DataError, match="of 1 classes"):
        probe_classes(make(1).only(make(1).classes == 0), make(1))
