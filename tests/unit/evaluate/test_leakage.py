from dataclasses import replace

import numpy as np
import pytest

from panfm.evaluate.leakage import leakage, organ_sets, presence_auc, presence_variance, site_accuracy, site_variance
from panfm.evaluate.probe_cohort import Task
from panfm.evaluate.probe_labels import LabelledStore
from panfm.evaluate.scores import draw_counts
from panfm.models import build_model

ONCE = np.ones((1, 2))
RANDOM = np.random.default_rng(0)


def slow_presence_variance(features, counts=None):
    """The definition, summed entry by entry; features of patients drawn several times stand there several times."""
    sets, patients, _ = features.shape
    middle = features.reshape(sets * patients, -1).mean(axis=0)
    whole = sum(((features[m, i] - middle) ** 2).sum() for m in range(sets) for i in range(patients))
    of_sets = sum(patients * ((features[m].mean(axis=0) - middle) ** 2).sum() for m in range(sets))
    of_patients = sum(sets * ((features[:, i].mean(axis=0) - middle) ** 2).sum() for i in range(patients))
    alike = sum(count**2 for count in counts) / patients**2 if counts is not None else 1 / patients
    return max((of_sets - (whole - of_sets - of_patients) * alike / (1 - alike)) / whole, 0.0)


def slow_site_variance(features, sites):
    middle, names = features.mean(axis=0), np.unique(sites)
    whole = ((features - middle) ** 2).sum()
    means = {name: features[sites == name].mean(axis=0) for name in names}
    between = sum((sites == name).sum() * ((means[name] - middle) ** 2).sum() for name in names)
    return max((between - (len(names) - 1) * (whole - between) / (len(features) - len(names))) / whole, 0.0)


def test_presence_by_hand():
    """Two sets, two patients, one feature: +-1 from the set and +-1 from the patient are half of the variance each."""
    both = np.array([[[2.0], [0.0]], [[0.0], [-2.0]]])
    assert presence_variance(both, ONCE) == pytest.approx([0.5])
    only_sets, only_patients = np.array([[[1.0], [1.0]], [[-1.0], [-1.0]]]), np.array([[[1.0], [-1.0]]] * 2)
    assert presence_variance(only_sets, ONCE) == pytest.approx([1.0])
    assert presence_variance(only_patients, ONCE) == pytest.approx([0.0])


def test_presence_equals_the_slow_definition_in_every_resample():
    features = RANDOM.normal(size=(4, 6, 3)) + RANDOM.normal(size=(4, 1, 3)) + 50.0
    counts = draw_counts(6, 5, seed=1)
    slow = [slow_presence_variance(np.repeat(features, row.astype(int), axis=1), row) for row in counts]
    assert presence_variance(features, counts) == pytest.approx(slow, rel=1e-9)


def test_noise_says_nothing_of_presence():
    shares = [presence_variance(RANDOM.normal(size=(8, 30, 4)), np.ones((1, 30)))[0] for _ in range(20)]
    assert np.mean(shares) < 0.01


def test_site_by_hand():
    """Two sites of two: between 4, whole 8, within 4 on 2 spare: (4 - 2) / 8."""
    features, sites = np.array([[0.0], [2.0], [2.0], [4.0]]), np.array([0, 0, 1, 1])
    assert site_variance(features, sites, np.ones((1, 4))) == pytest.approx([(4 - 2) / 8])
    assert slow_site_variance(features, sites) == pytest.approx(0.25)


def test_site_equals_the_slow_definition():
    features, sites = RANDOM.normal(size=(9, 3)) + 20.0, np.array([0] * 2 + [1] * 3 + [2] * 4)
    features[sites == 2] += 3.0
    assert site_variance(features, sites, np.ones((1, 9))) == pytest.approx([slow_site_variance(features, sites)])


def test_intervals_lie_around_the_estimate():
    """A resample repeats patients, which must not read as more variance between sets or sites."""
    patients, sites = RANDOM.normal(size=(1, 30, 40)), np.arange(30) % 3
    counts = draw_counts(30, 400, seed=2)
    for shift in (0.0, 0.7):
        of_sets = patients + RANDOM.normal(size=(8, 30, 40)) + shift * RANDOM.normal(size=(8, 1, 40))
        of_sites = patients[0] + shift * RANDOM.normal(size=(3, 40))[sites]
        for values in (presence_variance(of_sets, counts), site_variance(of_sites, sites, counts)):
            low, high = np.percentile(values[1:], [2.5, 97.5])
            assert low <= values[0] <= high
            assert abs(values[1:].mean() - values[0]) < 0.01 + 0.5 * (high - low) / 4


@pytest.mark.parametrize("features", [np.full((4, 6, 3), 0.1), np.zeros((1, 6, 3)), np.zeros((4, 1, 3))])
def test_presence_that_cannot_be_told_is_nan(features):
    assert np.isnan(presence_variance(features, np.ones((1, features.shape[1])))).all()


@pytest.mark.parametrize("sites", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_one_site_or_a_site_for_each_patient_cannot_be_told(sites):
    assert np.isnan(site_variance(RANDOM.normal(size=(4, 2)), np.array(sites), np.ones((1, 4)))).all()
    assert np.isnan(site_variance(np.ones((4, 2)), np.array([0, 0, 1, 1]), np.ones((1, 4)))).all()


@pytest.mark.parametrize(("organs", "sets"), [(0, 0), (1, 0), (2, 2), (3, 6), (7, 16)])
def test_sets_come_with_their_complements(organs, sets):
    drawn = organ_sets(organs, seed=3)
    assert drawn.shape == (sets, organs)
    assert (drawn[::2] == ~drawn[1::2]).all()
    assert len(np.unique(drawn, axis=0)) == sets
    assert drawn.any(axis=1).all()
    assert not drawn.all(axis=1).any()


def test_probes_of_presence():
    present, patients = organ_sets(3, seed=0), 20
    says = np.repeat(present[:, None, :], patients, axis=1).astype(float)
    silent, counts = RANDOM.normal(size=(1, patients, 3)).repeat(len(present), axis=0), draw_counts(patients, 20, 0)
    assert presence_auc(says, present, counts, seed=0) == pytest.approx(1.0)
    assert presence_auc(silent, present, counts, seed=0)[0] == pytest.approx(0.5, abs=0.01)
    assert presence_auc(np.ones_like(says), present, counts, seed=0)[0] == pytest.approx(0.5)


def test_probes_of_sites_by_hand():
    fit_sites, sites = np.repeat([0, 1], 10), np.array([0, 0, 0, 1])
    fit = np.where(fit_sites[:, None] == 1, 1.0, -1.0)
    counts = np.array([[1.0, 1, 1, 1], [1, 1, 1, 0]])
    assert site_accuracy(fit, fit_sites, np.array([[-1.0], [-1], [1], [1]]), sites, counts) == pytest.approx(
        [5 / 6, 2 / 3]
    )
    constant = site_accuracy(np.zeros((20, 1)), fit_sites, np.zeros((4, 1)), sites, counts[:1])
    assert constant == pytest.approx([0.5])


def place_of(store, split):
    return LabelledStore(replace(store, splits=(split,) * len(store.subjects)), {})


def test_a_model_is_measured_on_complete_patients_and_at_sites(make_run, make_store):
    run = make_run("[probe]\nbootstrap = 20\n")
    halves = [
        LabelledStore(replace(store, splits=("train",) * 12 + ("val",) * 8), {})
        for store in (make_store(run, 20, seed=seed) for seed in (1, 2))
    ]
    task = Task(run, halves, place_of(make_store(run, 24, complete=True), "test"), {})
    scores = leakage(task, {"untrained": build_model(run)})
    assert [(score.kind, score.metric, score.chance) for score in scores] == [
        ("presence", "variance", 0.0),
        ("presence", "auc", 0.5),
        ("site", "variance", 0.0),
        ("site", "accuracy", 0.5),
        ("site", "accuracy-of-presence", 0.5),
    ]
    for score in scores:
        assert 0.0 <= score.low <= score.value <= score.high <= 1.0
    assert scores[1].value > 0.9  # whether an organ's tokens are there is easy to read


@pytest.mark.parametrize("num_sites", [0, 1])
def test_without_complete_patients_and_with_one_site_nothing_is_told(make_run, make_store, num_sites):
    run = make_run()
    few = place_of(make_store(run, 6, complete=True), "test")
    sites = [LabelledStore(make_store(run, 20), {})] * num_sites
    assert leakage(Task(run, sites, few, {}), {"untrained": build_model(run)}) == ()
