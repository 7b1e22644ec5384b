import math
import re
from dataclasses import replace

import numpy as np
import pytest

from panfm.data.labels import Labels
from panfm.errors import DataError
from panfm.evaluate.embed import Features
from panfm.evaluate.probe_features import probe_features
from panfm.evaluate.probe_methods import METHODS


def make_features(prefix, split, n=40, seed=0, model="abc", pooling="cls"):
    values = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    names = tuple(f"{prefix}{i}" for i in range(n))
    return Features(names, (split,) * n, ("brain-mr",), np.ones((n, 1), bool), values, pooling, model)


def label(table, names=("sick", "size", "never")):
    values = np.stack([table.features[:, 0] > 0, 100 + 7 * table.features[:, 1], np.zeros(len(table.subjects))], axis=1)
    return Labels(table.subjects, names, values.astype(float))


def test_yes_no_labels_get_an_auc_and_numbers_an_r2():
    fit, test = make_features("a", "train"), make_features("b", "test", seed=1)
    scores, notes = probe_features([fit, test], [label(fit), label(test)], bootstrap=20)
    assert [(score.group, score.metric) for score in scores] == [
        ("sick", "auc"),
        ("sick", "calibration error"),
        ("sick", "brier"),
        ("size", "r2"),
        ("never", "auc"),
    ]
    assert scores[0].value > 0.95
    assert scores[3].value > 0.99
    assert scores[3].low <= scores[3].value <= scores[3].high
    assert math.isnan(scores[4].value)
    assert notes == ["never: not probed, fit subjects are all of one class"]


def test_subjects_without_labels_and_of_other_splits_are_left_out():
    fit, test, other = make_features("a", "train"), make_features("b", "test", seed=1), make_features("c", "val")
    lone = make_features("d", "train", seed=5)
    tables = [label(fit), label(test), label(other)]
    whole, _ = probe_features([fit, test], tables, bootstrap=0)
    same, _ = probe_features([fit, test, other, lone], tables, bootstrap=0)
    assert [score.value for score in whole[:4]] == [score.value for score in same[:4]]


def test_a_label_that_does_not_vary_in_the_test_set_is_noted():
    fit, test = make_features("a", "train"), make_features("b", "test", seed=1)
    flat = label(test)
    flat.values[:, 0] = 1.0
    scores, notes = probe_features([fit, test], [label(fit), flat], bootstrap=0)
    assert math.isnan(scores[0].value)
    assert "sick: cannot be told, it does not vary among the test subjects" in notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda fit, test: (
                [fit, make_features("b", "test", n=9)],
                [label(fit), label(make_features("b", "test", n=9))],
            ),
            "split test: found 9 labelled subjects, expected at least 10",
        ),
        (
            lambda fit, test: ([make_features("a", "train", n=9)], [label(make_features("a", "train", n=9))]),
            "split train: found 9 labelled subjects, expected at least 10",
        ),
        (lambda fit, test: ([fit, test], [label(fit), label(fit)]), "'a0' stands in two tables"),
        (lambda fit, test: ([fit, make_features("b", "test", model="x")], [label(fit)]), "different models"),
        (
            lambda fit, test: ([fit, make_features("b", "test", pooling="layers")], [label(fit)]),
            r"features of different poolings \(cls, layers\), expected one",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(change, message):
    features, labels = change(make_features("a", "train"), make_features("b", "test", seed=1))
    with pytest.raises(DataError, match=message):
        probe_features(features, labels)


def test_sessions_of_a_subject_count_as_one():
    fit, test = make_features("a", "train"), make_features("b", "test", seed=1)
    twice = replace(
        fit,
        subjects=fit.subjects * 2,
        splits=fit.splits * 2,
        present=np.concatenate([fit.present] * 2),
        features=np.concatenate([fit.features + 0.5, fit.features - 0.5]),
        sessions=("1",) * 40 + ("2",) * 40,
    )
    labels = [label(fit), label(test)]
    once, _ = probe_features([fit, test], labels, bootstrap=0)
    mean, _ = probe_features([twice, test], labels, bootstrap=0)
    assert [score.value for score in mean[:4]] == pytest.approx([score.value for score in once[:4]], abs=1e-4)


def by_name(scores):
    return {(score.arm, score.group, score.metric): score for score in scores}


def test_every_fold_fits_on_ten_subjects():
    enough, few = (make_features("a", "train", n=n) for n in (13, 12))
    assert probe_features([enough], [label(enough)], bootstrap=0)[0]
    with pytest.raises(DataError, match="split test: found 0 labelled subjects"):
        probe_features([few], [label(few)], bootstrap=0)


def test_without_a_test_split_subjects_are_cross_validated():
    fit = make_features("a", "train", n=60)
    scores, notes = probe_features([fit], [label(fit)], bootstrap=20)
    assert (
        notes[0] == "no labelled subject in the split test: 5-fold cross-validation over 60 subjects of the split train"
    )
    named = by_name(scores)
    assert named["features", "sick", "auc"].value > 0.9
    assert named["features", "size", "r2"].value > 0.99
    noise = replace(fit, features=make_features("a", "train", n=60, seed=9).features)
    assert by_name(probe_features([noise], [label(fit)], bootstrap=0)[0])["features", "size", "r2"].value < 0.2


def test_neighbours_tell_less_of_a_line_than_a_regression():
    tables = make_features("a", "train", n=80), make_features("b", "test", n=60, seed=1)
    line, near = (
        by_name(probe_features(tables, [label(one) for one in tables], bootstrap=0, method=method)[0])
        for method in (METHODS["linear"], METHODS["knn"])
    )
    assert near["features", "sick", "auc"].value > 0.9
    assert 0.3 < near["features", "size", "r2"].value < line["features", "size", "r2"].value


def test_two_models_are_compared_on_the_same_resamples():
    fit, test = make_features("a", "train"), make_features("b", "test", seed=1)
    labels = [label(fit), label(test)]
    noisy = [
        replace(table, features=table.features + 3 * make_features("c", "x", seed=seed).features, model_hash="other")
        for seed, table in enumerate((fit, test), start=5)
    ]
    named = by_name(probe_features([fit, test], labels, bootstrap=200, against=noisy)[0])
    own, other, apart = (named[arm, "sick", "auc"] for arm in ("features", "against", "difference"))
    assert apart.value == pytest.approx(own.value - other.value)
    assert 0.0 < apart.low < apart.value < apart.high
    same = by_name(probe_features([fit, test], labels, bootstrap=20, against=[fit, test])[0])[
        "difference", "size", "r2"
    ]
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    for other in ([fit, make_features("b", "test", n=39, seed=1)], [make_features("a", "train", n=39), test]):
        with pytest.raises(DataError, match="features of other subjects"):
            probe_features([fit, test], labels, against=other)


def test_draws_of_few_labels_without_both_classes_are_left_out_and_counted():
    fit, test = make_features("a", "train", n=100), make_features("b", "test", seed=1)
    rare = Labels(fit.subjects, ("sick",), (fit.features[:, :1] > np.sort(fit.features[:, 0])[-8]).astype(float))
    told = Labels(test.subjects, ("sick",), (test.features[:, :1] > 0).astype(float))
    scores, notes = probe_features([fit, test], [rare, told], bootstrap=10, few_labels=True)
    named = by_name(scores)
    [note] = [note for note in notes if "10% of labels" in note]
    assert re.fullmatch("sick, 10% of labels: [1-4] of 5 draws are of one class, left out", note)
    assert named["features", "sick", "auc, 10% of labels"].value > 0.6


@pytest.mark.slow
def test_a_curve_of_few_labels_rises_to_the_whole():
    fit, test = make_features("a", "train", n=300), make_features("b", "test", n=100, seed=1)
    noisy = [
        replace(one, features=np.hstack([one.features, np.random.default_rng(3).normal(size=(len(one.subjects), 20))]))
        for one in (fit, test)
    ]
    named = by_name(probe_features(noisy, [label(fit), label(test)], bootstrap=0, few_labels=True)[0])
    curve = [named["features", "size", f"r2, {share} of labels"].value for share in ("1%", "5%", "10%", "50%", "100%")]
    assert math.isnan(curve[0])
    assert curve[1:] == sorted(curve[1:])
    assert curve[-1] == named["features", "size", "r2"].value


def test_classes_have_a_mean_and_grades_a_kappa():
    fit, test = make_features("a", "train", n=90), make_features("b", "test", n=60, seed=1)

    def classes(table):
        grade = np.digitize(table.features[:, 0], [-0.5, 0.5])
        return Labels(
            table.subjects, ("g=0", "g=1", "g=2", "grade"), np.column_stack([np.eye(3)[grade], grade]).astype(float)
        )

    named = by_name(probe_features([fit, test], [classes(fit), classes(test)], bootstrap=20)[0])
    own = [named["features", f"g={one}", "auc"].value for one in range(3)]
    assert named["features", "g (mean of classes)", "auc"].value == pytest.approx(np.mean(own))
    assert named["features", "grade", "weighted kappa"].value > 0.7
