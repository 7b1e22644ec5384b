"""The probe of classes at few labels: draws of labels, AUC, leave-one-out error."""

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from panfm.evaluate.label_sums import PENALTIES
from panfm.evaluate.probe_labels import LabelInfo, LabelledStore
from simulations.cohorts.opened import OpenedCohort
from simulations.studies import _class_probe as probe


def test_a_draw_has_its_share_of_every_class_and_two_at_least():
    classes = np.repeat([0, 1, 2], [100, 30, 1])
    rows = probe.label_draw(classes, 5, 0, "chest-xray", 0)
    assert np.bincount(classes[rows]).tolist() == [5, 2, 1]
    assert np.array_equal(rows, probe.label_draw(classes, 5, 0, "chest-xray", 0))
    assert not np.array_equal(rows, probe.label_draw(classes, 5, 0, "chest-xray", 1))
    assert probe.label_draw(classes, 100, 0, "chest-xray", 0).tolist() == list(range(131))


def test_the_probe_tells_separated_classes_and_not_noise():
    random = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], 20)
    apart = np.eye(3)[classes] * 4 + random.normal(size=(60, 3))
    assert probe.class_auc(apart, classes, apart, classes) > 0.99
    noise = random.normal(size=(120, 5))
    assert 0.3 < probe.class_auc(noise[:60], classes, noise[60:], classes) < 0.7


def test_the_leave_one_out_error_is_that_of_refitted_regressions():
    random = np.random.default_rng(1)
    classes = np.repeat([0, 1, 2], 4)
    features = np.eye(3)[classes] + random.normal(size=(12, 3))
    scaled, targets = StandardScaler().fit_transform(features), np.eye(3)[classes]
    errors = np.zeros(len(PENALTIES))
    for left_out in range(12):
        x, y = np.delete(scaled, left_out, axis=0), np.delete(targets, left_out, axis=0)
        centre, mean = x.mean(axis=0), y.mean(axis=0)
        for number, penalty in enumerate(PENALTIES):
            weights = np.linalg.solve((x - centre).T @ (x - centre) + penalty * np.eye(3), (x - centre).T @ (y - mean))
            predicted = mean + (scaled[left_out] - centre) @ weights
            errors[number] += ((predicted - targets[left_out]) ** 2).sum()
    assert probe.class_error(features, classes) == pytest.approx(errors.min() / 12)


def test_the_error_sums_over_the_streams_at_sites_and_reads_no_test_picture(make_run, make_store):
    run = make_run()
    site, holdout = make_store(run, 12, complete=True), make_store(run, 12, complete=True, seed=1)
    first, *_ = run.streams
    modality = first.rpartition("-")[2]
    labels = {f"{modality}-{number}": np.arange(12) % 2 == number for number in (0, 1)}
    values = {name: value.astype(float) for name, value in labels.items()}
    cohort = OpenedCohort(
        {"clinic": LabelledStore(site, values)},
        LabelledStore(holdout, values),
        {name: LabelInfo("class") for name in labels},
    )
    read_stores = []

    def read(store, stream, indices):
        read_stores.append(store)
        return np.random.default_rng(0).normal(size=(12, 4))[indices]

    streams = probe.probed_streams(cohort)
    error = probe.leave_one_out_error(read, cohort)
    one = probe.class_error(*probe.read_classes(cohort, read, first, cohort.sites["clinic"], "train"))
    assert error == pytest.approx(one * len(streams))
    assert {id(store) for store in read_stores} == {id(site)}
