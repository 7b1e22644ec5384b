"""Patients and images of the phantom: what they promise, and what the studies lean on."""

import nibabel as nib
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from panfm.anatomy import DEFAULT_ORGANS
from panfm.errors import DataError
from simulations.cohorts.phantom_body import FACTORS, ORGANS, TRAITS, loadings, mixing
from simulations.cohorts.phantom_draw import PRESETS, Phantom
from simulations.cohorts.phantom_image import TOP
from simulations.cohorts.phantom_labels import LABEL_NOISE, LABELS, draw_labels, score

PHANTOM_SEED = 100


def _factor(subjects, name):
    return subjects.latents[:, FACTORS.index(name)]


def test_factors_have_unit_variance_and_the_declared_parents():
    covariance = mixing() @ mixing().T
    np.testing.assert_allclose(np.diag(covariance), 1.0, rtol=1e-12)
    adiposity, age = FACTORS.index("adiposity"), FACTORS.index("age")
    assert covariance[adiposity, age] == pytest.approx(0.2)
    assert covariance[FACTORS.index("stature"), age] == 0.0


@pytest.mark.parametrize("organ", ORGANS)
def test_traits_have_unit_variance_over_patients(organ):
    latents = np.random.default_rng(0).standard_normal((20_000, len(FACTORS))) @ mixing().T
    np.testing.assert_allclose((latents @ loadings(organ)).var(axis=0), np.ones(len(TRAITS)), atol=0.05)


def test_organs_are_the_default_ones():
    assert set(ORGANS) == set(DEFAULT_ORGANS)
    assert all(set(preset.amplitude) == set(ORGANS) == set(preset.scan_odds) for preset in PRESETS.values())


def test_same_seed_same_patients_and_voxels_whatever_came_before():
    first, second = Phantom("transient", 7), Phantom("transient", 7)
    one = first.draw("site-a", 5, DEFAULT_ORGANS)
    second.draw("site-b", 3, DEFAULT_ORGANS)
    two = second.draw("site-a", 5, DEFAULT_ORGANS)
    np.testing.assert_array_equal(one.latents, two.latents)
    np.testing.assert_array_equal(one.labels, two.labels)
    np.testing.assert_array_equal(one.scanned, two.scanned)
    second.render(two, 4, "heart")
    np.testing.assert_array_equal(first.render(one, 2, "liver")[0], second.render(two, 2, "liver")[0])


def test_another_seed_or_place_gives_other_patients():
    base = Phantom("transient", 7).draw("site-a", 5, DEFAULT_ORGANS).latents
    assert not np.array_equal(base, Phantom("transient", 8).draw("site-a", 5, DEFAULT_ORGANS).latents)
    assert not np.array_equal(base, Phantom("transient", 7).draw("site-b", 5, DEFAULT_ORGANS).latents)


@pytest.mark.parametrize("organ", ORGANS)
def test_images_come_as_the_scanner_gives_them(organ):
    phantom = Phantom("transient", 7)
    voxels, affine = phantom.render(phantom.draw("site-a", 1, [organ]), 0, organ)
    expected = ORGANS[organ]
    assert voxels.dtype == np.int16
    assert "".join(nib.orientations.aff2axcodes(affine)) == expected.axcodes
    ras = nib.as_closest_canonical(nib.Nifti1Image(voxels, affine))
    assert ras.shape == expected.size
    np.testing.assert_allclose(ras.header.get_zooms(), expected.spacing_mm)
    np.testing.assert_allclose(ras.affine[:3, 3], -np.array(expected.spacing_mm) * (np.array(expected.size) - 1) / 2)


def test_scanners_differ():
    assert len({organ.axcodes for organ in ORGANS.values()}) >= 4
    assert any(len(set(organ.spacing_mm)) > 1 for organ in ORGANS.values())


@pytest.mark.parametrize("organ", ORGANS)
def test_vials_pin_the_percentiles_of_the_mr_rule(organ):
    phantom = Phantom("lasting", 7)
    subjects = phantom.draw("site-a", 3, [organ])
    for index in range(3):
        low, high = np.percentile(phantom.render(subjects, index, organ)[0], [1, 99])
        assert (low, high) == (0, TOP)


def test_dominant_organs_vary_most_between_patients():
    phantom = Phantom("transient", 7)
    subjects = phantom.draw("site-a", 40, DEFAULT_ORGANS)
    spread = {
        organ: np.std([phantom.render(subjects, index, organ)[0].mean() for index in range(40)])
        for organ in DEFAULT_ORGANS
    }
    assert min(spread["heart"], spread["adipose"]) > 3 * max(spread[organ] for organ in ("brain", "kidney", "pancreas"))


def test_labels_are_thirteen_categories_and_fourteen_diseases():
    kinds = [label.kind for label in LABELS.values()]
    assert (kinds.count("category"), kinds.count("disease")) == (13, 14)
    assert sum(label.weak for label in LABELS.values()) >= 10
    assert all(set(label.organs) <= set(ORGANS) for label in LABELS.values())


def test_prevalences_are_as_declared():
    latents = np.random.default_rng(0).standard_normal((20_000, len(FACTORS))) @ mixing().T
    found = draw_labels(latents, np.random.default_rng(1)).mean(axis=0)
    np.testing.assert_allclose(found, [label.prevalence for label in LABELS.values()], atol=0.015)


def test_scores_tell_the_labels_apart_as_well_as_promised():
    subjects = Phantom("transient", PHANTOM_SEED).draw("site-a", 4000, DEFAULT_ORGANS)
    found = [
        roc_auc_score(subjects.labels[:, column], score(label, subjects.latents))
        for column, label in enumerate(LABELS.values())
    ]
    assert 0.85 < np.mean(found) < 0.90
    assert LABEL_NOISE > 0


def test_weak_labels_need_weak_organs():
    """A linear reader of all that heart and adipose can show is worse on weak labels than on the others."""
    subjects = Phantom("transient", PHANTOM_SEED).draw("site-a", 4000, DEFAULT_ORGANS)
    shown = np.concatenate([subjects.latents @ loadings(organ) for organ in ("heart", "adipose")], axis=1)
    values = {True: [], False: []}
    for column, label in enumerate(LABELS.values()):
        model = LogisticRegression().fit(shown[:2000], subjects.labels[:2000, column])
        values[label.weak].append(roc_auc_score(subjects.labels[2000:, column], model.decision_function(shown[2000:])))
    assert np.mean(values[True]) < 0.68
    assert np.mean(values[False]) > np.mean(values[True]) + 0.08


def test_scans_are_missing_by_severity_age_and_site():
    phantom = Phantom("transient", PHANTOM_SEED)
    subjects = phantom.draw("site-a", 4000, DEFAULT_ORGANS)
    for column, organ in enumerate(DEFAULT_ORGANS):
        severity = _factor(subjects, ORGANS[organ].severity)
        scanned = subjects.scanned[:, column]
        assert severity[scanned].mean() > severity[~scanned].mean() + 0.3
    older = _factor(subjects, "age") > 0
    assert subjects.scanned[older].mean() > subjects.scanned[~older].mean() + 0.05
    elsewhere = phantom.draw("site-b", 4000, DEFAULT_ORGANS)
    assert np.abs(elsewhere.scanned.mean(axis=0) - subjects.scanned.mean(axis=0)).max() > 0.05


def test_every_patient_has_an_organ_and_only_those_of_the_site():
    subjects = Phantom("transient", 7).draw("site-a", 500, ["brain", "heart"])
    assert subjects.scanned.shape == (500, 2)
    assert subjects.scanned.any(axis=1).all()
    assert not subjects.scanned.all()


def test_complete_patients_miss_nothing_and_are_otherwise_the_same():
    phantom = Phantom("transient", 7)
    complete, usual = (phantom.draw("holdout", 20, DEFAULT_ORGANS, complete=flag) for flag in (True, False))
    assert complete.scanned.all()
    np.testing.assert_array_equal(complete.labels, usual.labels)


def test_age_shift_moves_age_and_what_depends_on_it():
    young, old = (Phantom("transient", 7).draw("a", 4000, ["brain"], age_shift=shift) for shift in (0.0, 0.5))
    assert (_factor(old, "age") - _factor(young, "age")).mean() == pytest.approx(0.5)
    assert _factor(old, "neuro").mean() > _factor(young, "neuro").mean() + 0.1


def test_in_shortcut_weak_organs_show_the_build_that_heart_shows_purely():
    """A trait's variance is 1: nuisance .09 and 4 of build in 5.09 of heart; nuisance .81 in 5.81 of brain."""
    phantom = Phantom("shortcut", 7)
    patients = phantom.draw("a", 4000, DEFAULT_ORGANS)
    build = (_factor(patients, "stature") + _factor(patients, "adiposity")) / 2**0.5
    for organ, share in (("heart", 4 / 5.09), ("brain", 4 / 5.81)):
        rng = np.random.default_rng(0)
        traits = np.stack([phantom._traits(latents, organ, rng) for latents in patients.latents])
        slopes = [np.cov(trait, build)[0, 1] / build.var() for trait in traits.T]
        assert np.median(np.square(slopes)) > 0.75 * share
    scanned = patients.scanned.mean(axis=0)
    assert scanned[DEFAULT_ORGANS.index("heart")] > 0.97
    assert scanned[DEFAULT_ORGANS.index("kidney")] < 0.75


def test_unknown_preset_and_organ_are_refused():
    with pytest.raises(DataError, match=r"preset 'strong': expected one of transient, lasting"):
        Phantom("strong", 0)
    with pytest.raises(DataError, match="organ 'lung': expected one of brain"):
        Phantom("transient", 0).draw("a", 1, ["lung"])
