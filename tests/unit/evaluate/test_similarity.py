import itertools

import numpy as np
import pytest

from panfm.evaluate.representation import linear_cka, modality_cka


def slow_hsic(one, other):
    """Mean over four different rows of K_ij (L_ij + L_qr - 2 L_iq)."""
    terms = [
        one[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
        for i, j, q, r in itertools.permutations(range(len(one)), 4)
    ]
    return np.mean(terms)


@pytest.mark.parametrize(("rows", "widths"), [(4, (3, 5)), (6, (2, 2)), (7, (10, 4))])
def test_cka_against_a_slow_reference(rows, widths):
    random = np.random.default_rng(rows)
    first = random.normal(size=(rows, widths[0]))
    second = random.normal(size=(rows, widths[1])) + first[:, :1]
    one, other = first @ first.T, second @ second.T
    expected = slow_hsic(one, other) / np.sqrt(slow_hsic(one, one) * slow_hsic(other, other))
    assert linear_cka(first, second) == pytest.approx(expected, rel=1e-9)


def test_cka_is_one_up_to_rotation_shift_and_scale():
    random = np.random.default_rng(0)
    features = random.normal(size=(6, 5)).astype(np.float32)
    rotation = np.linalg.qr(random.normal(size=(5, 5)))[0]
    assert linear_cka(features, 3.0 * features @ rotation + 100.0) == pytest.approx(1.0, abs=1e-6)


def test_unrelated_features_have_none_however_wide():
    """The plain estimate would give nearly 1 for six rows of 500 features."""
    random = np.random.default_rng(0)
    values = [linear_cka(random.normal(size=(6, 500)), random.normal(size=(6, 500))) for _ in range(200)]
    assert abs(np.nanmean(values)) < 0.1


@pytest.mark.parametrize("features", [np.ones((6, 3)), np.eye(3), np.zeros((3, 3)), np.zeros((0, 3))])
def test_too_little_is_nan(features):
    other = np.random.default_rng(0).normal(size=features.shape)
    assert np.isnan(linear_cka(features, other))


def make(modality_scale):
    """Six classes in three modalities: a and b show them alike up to a shift, c in its own way."""
    random = np.random.default_rng(1)
    means, strange = random.normal(size=(6, 8)), random.normal(size=(6, 8))
    classes = np.tile(np.arange(6), 30)
    modality = np.repeat(["a", "b", "c"], 60)
    features = np.where((modality == "c")[:, None], strange[classes], means[classes])
    features = features + modality_scale * np.repeat(random.normal(size=(3, 8)), 60, axis=0)
    return features + 0.05 * random.normal(size=features.shape), modality, classes


def test_modalities_that_show_classes_alike_are_found():
    found = modality_cka(*make(modality_scale=50.0))
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert found["a", "b"] > 0.95
    assert found["a", "c"] < 0.6
    assert found["a", "c"] == pytest.approx(found["b", "c"], abs=0.05)


def test_only_shared_classes_count():
    features, modality, classes = make(modality_scale=0.0)
    kept = (modality != "b") | (classes < 5)
    found = modality_cka(features[kept], modality[kept], classes[kept])
    assert found["a", "b"] > 0.95
    none = (modality != "b") | (classes < 3)
    assert np.isnan(modality_cka(features[none], modality[none], classes[none])["a", "b"])
    apart = np.where(modality == "b", classes + 6, classes)
    assert np.isnan(modality_cka(features, modality, apart)["a", "b"])
