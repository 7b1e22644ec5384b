import math
from dataclasses import replace

import numpy as np
import pytest

from panfm.data.labels import Labels
from panfm.errors import DataError
from panfm.evaluate.embed import Features
from panfm.evaluate.probe_features import probe_features


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
    assert [(score.group, score.metric) for score in scores] == [("sick", "auc"), ("size", "r2"), ("never", "auc")]
    assert scores[0].value > 0.95
    assert scores[1].value > 0.99
    assert scores[1].low <= scores[1].value <= scores[1].high
    assert math.isnan(scores[2].value)
    assert notes == ["never: not probed, fit subjects are all of one class"]


def test_subjects_without_labels_and_of_other_splits_are_left_out():
    fit, test, other = make_features("a", "train"), make_features("b", "test", seed=1), make_features("c", "val")
    lone = make_features("d", "train", seed=5)
    tables = [label(fit), label(test), label(other)]
    whole, _ = probe_features([fit, test], tables, bootstrap=0)
    same, _ = probe_features([fit, test, other, lone], tables, bootstrap=0)
    assert [score.value for score in whole[:2]] == [score.value for score in same[:2]]


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
        (lambda fit, test: ([fit], [label(fit)]), "split test: found 0 labelled subjects, expected at least 10"),
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
    assert [score.value for score in mean[:2]] == pytest.approx([score.value for score in once[:2]], abs=1e-4)
