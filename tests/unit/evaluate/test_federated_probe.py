"""The federated ridge probe: by hand, against scikit-learn on pooled patients, leave-one-out by refitting, floors."""

from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

from panfm.errors import ProtocolError
from panfm.evaluate.federated_probe import (
    LabelledSite,
    choose_penalty,
    cross_validated_error,
    discriminants,
    probe_together,
    ridge_path,
)
from panfm.evaluate.label_sums import PENALTIES, LabelSums, RidgePath, contributing_rows, site_errors, site_sums

TASK = "task"


def draw(n, d, labels=1, seed=0, *, offset=3.0, spread=1.0):
    random = np.random.default_rng(seed)
    features = (random.normal(size=(n, d)) * spread + offset).astype(np.float32)
    signal = (features - offset) @ random.normal(size=(d, labels)) / np.sqrt(d)
    return features, (signal + random.normal(size=(n, labels)) > 0).astype(np.float64)


def split(features, targets, num_sites, floor=1):
    parts = np.array_split(np.arange(len(features)), num_sites)
    return [LabelledSite(f"site{i}", features[at], {TASK: targets[at]}, floor) for i, at in enumerate(parts)]


def pooled(features, targets):
    """Slow, obvious and of others: everybody's features in one place, scikit-learn's scaler and leave-one-out."""
    known = np.isfinite(targets).all(axis=1)
    scaler = StandardScaler().fit(features[known].astype(np.float64))
    ridge = RidgeCV(alphas=PENALTIES).fit(scaler.transform(features[known].astype(np.float64)), targets[known])

    def score(rows):
        return ridge.predict(scaler.transform(rows.astype(np.float64))).reshape(len(rows), targets.shape[1])

    return score, float(ridge.alpha_)


def fitted(sites):
    """The probe and its penalty, by messages that went through arrays."""
    sums = [site_sums(site.features, site.targets, floor=site.floor).tasks for site in sites]
    d, c = sites[0].features.shape[1], sites[0].targets[TASK].shape[1]
    path = ridge_path([LabelSums.from_arrays(s[TASK].to_arrays(), features=d, labels=c) for s in sums if s])
    path = RidgePath.from_arrays(path.to_arrays(), features=d, labels=c)
    errors = [site_errors(site.features, site.targets, {TASK: path}, floor=site.floor) for site in sites]
    return choose_penalty(path, [{"errors": given[TASK]} for given in errors if given])


def test_sums_of_two_patients_by_hand():
    sums = LabelSums.of(np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[1.0], [0.0]]))
    assert (float(sums.count), sums.x.tolist(), sums.y.tolist(), sums.yy.tolist()) == (2.0, [4.0, 7.0], [1.0], [1.0])
    assert (sums.xx.tolist(), sums.xy.tolist()) == ([[10.0, 17.0], [17.0, 29.0]], [[1.0], [2.0]])


def test_one_feature_by_hand():
    """x = 1, 2, 3, 4 and y = 0, 0, 1, 1, by the formulas of a line."""
    x, y = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([[0.0], [0.0], [1.0], [1.0]])
    path = ridge_path([LabelSums.of(x[:1], y[:1]), LabelSums.of(x[1:], y[1:])])
    deviation = np.sqrt(1.25)
    assert_allclose([path.centre[0], path.scale[0], path.eigenvalues[0]], [2.5, deviation, 4.0])
    prediction = path.predictions(np.array([[4.0]]))[:, 0, 0]
    assert_allclose(prediction, 0.5 + 1.5 / deviation * (2 / deviation) / (4.0 + PENALTIES))
    assert_allclose(path.leverages(np.array([[4.0]]))[:, 0], 0.25 + (1.5 / deviation) ** 2 / (4.0 + PENALTIES))


def test_leave_one_out_errors_are_those_of_refitting_without_each_patient():
    features, targets = draw(15, 4, labels=2)
    site = LabelledSite("one", features, {TASK: targets}, 1)
    path = ridge_path([site_sums(features, site.targets, floor=1).tasks[TASK]])
    [errors] = site_errors(features, site.targets, {TASK: path}, floor=1).values()
    standard = (features - path.centre) / path.scale
    for row, penalty in enumerate(PENALTIES):
        slow = np.zeros(2)
        for left_out in range(15):
            rest = np.arange(15) != left_out
            # A column so large that its weight costs nothing is the intercept.
            design = np.hstack([standard, np.full((15, 1), 1e6)])
            ridge = Ridge(alpha=penalty, fit_intercept=False, solver="svd").fit(design[rest], targets[rest])
            slow += (targets[left_out] - ridge.predict(design[[left_out]])[0]) ** 2
        assert_allclose(errors[row], slow, rtol=1e-5)


@settings(max_examples=12)
@given(
    n=st.integers(8, 60),
    d=st.integers(1, 30),
    labels=st.integers(1, 3),
    sites=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_federated_equals_pooled(n, d, labels, sites, seed):
    features, targets = draw(n, d, labels, seed)
    if (targets.max(axis=0) == targets.min(axis=0)).any():
        targets[0] = 1 - targets[0]
    probe, penalty = fitted(split(features, targets, sites))
    score, expected = pooled(features, targets)
    assert penalty == pytest.approx(expected)
    fresh, _ = draw(20, d, seed=seed + 100)
    assert_allclose(probe.score(fresh), score(fresh), atol=1e-6)


@pytest.mark.parametrize("num_sites", [1, 3])
@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (300.0, 0.5), (-2.0, 1e-3)])
def test_features_that_outnumber_labels_and_lie_far_from_zero_are_equal_to_pooled(num_sites, offset, spread):
    features, targets = draw(24, 150, 2, offset=offset, spread=spread)
    probe, penalty = fitted(split(features, targets, num_sites))
    score, expected = pooled(features, targets)
    assert penalty == pytest.approx(expected)
    assert_allclose(probe.score(features), score(features), atol=1e-6)


def test_a_site_of_one_class_unknown_labels_and_a_constant_feature_are_equal_to_pooled():
    features, targets = draw(50, 6, 2)
    features[:, 2] = 0.1  # in float64 its variance comes out as rounding
    order = targets[:, 0].argsort(kind="stable")
    features, targets = features[order], targets[order]
    targets[[3, 30], 1] = np.nan
    sites = split(features, targets, 5)
    assert len(np.unique(sites[0].targets[TASK][:, 0])) == 1
    probe, penalty = fitted(sites)
    score, expected = pooled(features, targets)
    assert penalty == pytest.approx(expected)
    assert_allclose(probe.score(features), score(features), atol=1e-6)
    assert_allclose(probe.weights[2], 0.0, atol=1e-12)


def test_numbers_are_regressed_as_well_as_classes():
    features, _ = draw(40, 5)
    targets = 1000 + 50 * features[:, :1].astype(np.float64)
    probe, _ = fitted(split(features, targets, 3))
    assert_allclose(probe.score(features), pooled(features, targets)[0](features), rtol=1e-6)


def test_the_order_and_the_number_of_sites_do_not_matter():
    features, targets = draw(60, 8)
    probes = [fitted(sites)[0] for sites in (split(features, targets, 4), split(features, targets, 4)[::-1])]
    assert_allclose(probes[0].weights, probes[1].weights, atol=1e-10)


def test_several_tasks_and_sites_that_lack_some():
    features, targets = draw(60, 4, 2)
    first, second = split(features, targets, 2)
    one = replace(first, targets={"a": first.targets[TASK][:, :1], "b": first.targets[TASK][:, 1:]})
    two = replace(second, targets={"b": second.targets[TASK][:, 1:]})
    together = probe_together([one, two])
    assert list(together.probes) == ["a", "b"]
    assert together.withheld == {}
    assert_allclose(together.probes["b"].score(features), pooled(features, targets[:, 1:])[0](features), atol=1e-6)
    assert_allclose(
        together.probes["a"].score(features), pooled(first.features, targets[:30, :1])[0](features), atol=1e-6
    )


def test_sites_without_a_known_label_give_nothing():
    features, targets = draw(30, 4)
    known, unknown = split(features, targets, 2)
    nothing = replace(unknown, targets={TASK: np.full_like(unknown.targets[TASK], np.nan)})
    together = probe_together([known, nothing])
    assert together.withheld == {"site1": ("task: nothing is given, fewer than 1 labelled patients",)}
    assert_allclose(together.probes[TASK].score(features), fitted([known])[0].score(features))
    assert probe_together([nothing]).probes == {}


@pytest.mark.parametrize(
    ("ones", "zeros", "kept", "lines"),
    [
        (8, 8, 16, []),
        (7, 8, 8, ["task: patients of a class with fewer than 8 patients are left out"]),
        (0, 8, 8, []),
        (7, 7, 0, ["task: nothing is given, fewer than 8 labelled patients"]),
        (3, 0, 0, ["task: nothing is given, fewer than 8 labelled patients"]),
    ],
)
def test_floors_on_patients_and_on_classes(ones, zeros, kept, lines):
    targets = np.array([1.0] * ones + [0.0] * zeros).reshape(-1, 1)
    rows, notes = contributing_rows({TASK: targets}, 8)
    assert sum(map(len, rows.values())) == kept
    assert notes == lines


def test_a_floor_counts_patients_alone_where_targets_are_numbers():
    targets = np.arange(10.0)[:, None]
    assert len(contributing_rows({TASK: targets}, 8)[0][TASK]) == 10
    assert contributing_rows({TASK: targets[:7]}, 8) == (
        {},
        ["task: nothing is given, fewer than 8 labelled patients"],
    )


def test_sums_of_two_tasks_do_not_differ_by_a_few_patients():
    """Else one would be the other less those few."""
    every = np.array([1.0, 0.0] * 20)[:, None]
    but_two = every.copy()
    but_two[[4, 9]] = np.nan
    rows, notes = contributing_rows({"a": every, "b": but_two, "c": every}, 8)
    assert list(rows) == ["a", "c"]
    told = "together with the tasks before it, it tells fewer than 8 patients from all others"
    assert notes == [f"b: nothing is given, {told}"]
    assert list(contributing_rows({"a": every, "b": but_two}, 1)[0]) == ["a", "b"]


def test_labels_of_two_tasks_do_not_differ_for_a_few_patients():
    every = np.array([1.0, 0.0] * 20)[:, None]
    but_one = every.copy()
    but_one[4] = 1.0 - but_one[4]
    assert list(contributing_rows({"a": every, "b": but_one}, 8)[0]) == ["a"]
    assert list(contributing_rows({"a": every, "b": 1.0 - every}, 8)[0]) == ["a", "b"]
    numbers = np.arange(40.0)[:, None] + 0.5
    assert list(contributing_rows({"a": numbers, "b": numbers + np.eye(40)[:, 9:10]}, 8)[0]) == ["a"]


@pytest.mark.parametrize("rare", [[1.0] * 39 + [2.0], [-1.0] * 39 + [1.0], [0.0] * 38 + [1.0, 2.0]])
def test_a_rare_class_is_left_out_whatever_its_number_and_beside_numbers(rare):
    rare, ages = np.array(rare)[:, None], np.linspace(20.0, 80.0, 40)[:, None]
    for targets in (rare, np.hstack([rare, ages])):
        rows, _ = contributing_rows({TASK: targets}, 8)
        assert np.unique(targets[rows[TASK], 0]).size == 1
    almost_constant = np.full((40, 1), 36.6)
    almost_constant[3] = 41.2
    assert contributing_rows({TASK: almost_constant}, 8)[0] == {}


@pytest.mark.parametrize(("row", "column", "value"), [(0, 1, 1e4), (0, 1, 1.7e308), (2, 2, 0.0), (1, 1, 1e300)])
def test_products_that_no_patients_have_are_refused_by_site(row, column, value):
    features, targets = draw(30, 4)
    arrays = {name: array.copy() for name, array in LabelSums.of(features, targets).to_arrays().items()}
    LabelSums.from_arrays(arrays, features=4, labels=targets.shape[1])
    arrays["xx"][row, column] = arrays["xx"][column, row] = value
    with pytest.raises(ProtocolError, match=r"that no patients have together|beyond all measure"):
        LabelSums.from_arrays(arrays, features=4, labels=targets.shape[1])


def test_labels_that_features_explain_more_than_wholly_are_refused():
    features, targets = draw(6, 4)
    sums = LabelSums.of(features, targets)
    arrays = sums.to_arrays() | {"xy": np.sqrt(np.outer(sums.xx.diagonal(), sums.yy)) * 0.99}
    with pytest.raises(ProtocolError, match="that no patients have together"):
        LabelSums.from_arrays(arrays, features=4, labels=targets.shape[1])


def test_what_a_site_answers_is_its_sums_and_nothing_else():
    features, targets = draw(30, 4)
    answer = site_sums(features, {TASK: targets}, floor=8)
    arrays = answer.tasks[TASK].to_arrays()
    assert {name: array.shape for name, array in arrays.items()} == {
        "count": (),
        "x": (4,),
        "xx": (4, 4),
        "y": (1,),
        "xy": (4, 1),
        "yy": (1,),
    }
    assert all(array.dtype == np.float64 for array in arrays.values())
    order = np.random.default_rng(0).permutation(30)
    again = site_sums(features[order], {TASK: targets[order]}, floor=8).tasks[TASK].to_arrays()
    for name, array in arrays.items():
        assert_allclose(again[name], array, rtol=1e-12)


HOSTILE = {
    "not finite": lambda a: a | {"x": a["x"] * np.nan},
    "infinite": lambda a: a | {"xx": a["xx"] + np.inf},
    "float32": lambda a: a | {"xy": a["xy"].astype(np.float32)},
    "shape": lambda a: a | {"xx": a["xx"][:3]},
    "broadcast": lambda a: a | {"x": a["x"][:1]},
    "missing": lambda a: {name: array for name, array in a.items() if name != "y"},
    "more": lambda a: a | {"extra": a["y"]},
    "no patient": lambda a: a | {"count": np.array(0.0)},
    "half a patient": lambda a: a | {"count": np.array(30.5)},
    "negative": lambda a: a | {"count": np.array(-30.0)},
    "huge": lambda a: a | {"count": np.array(1e300)},
    "negative squares": lambda a: a | {"xx": -a["xx"]},
    "not symmetric": lambda a: a | {"xx": a["xx"] + np.triu(np.ones((4, 4)))},
    "mean too large": lambda a: a | {"x": a["x"] * 100},
    "labels too large": lambda a: a | {"y": a["y"] * 100},
    "products too large": lambda a: a | {"xy": a["xy"] * 1e6},
    "squares too small": lambda a: a | {"yy": a["yy"] * 0},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_sums_that_no_patients_have_are_refused(name):
    features, targets = draw(30, 4)
    arrays = site_sums(features, {TASK: targets}, floor=1).tasks[TASK].to_arrays()
    LabelSums.from_arrays(arrays, features=4, labels=1)
    with pytest.raises(ProtocolError, match=r"^(message|label sums): ") as caught:
        LabelSums.from_arrays(HOSTILE[name](arrays), features=4, labels=1)
    assert "\n" not in str(caught.value)


def test_a_scatter_with_a_negative_eigenvalue_and_too_many_features_are_refused():
    features, targets = draw(30, 2)
    sums = site_sums(features, {TASK: targets}, floor=1).tasks[TASK]
    wrong = replace(sums, xx=sums.xx + 40 * np.array([[0.0, 1.0], [1.0, 0.0]]))
    with pytest.raises(ProtocolError, match="a negative eigenvalue"):
        ridge_path([wrong])
    with pytest.raises(ProtocolError, match="expected some site's"):
        ridge_path([])
    wide = LabelSums(np.array(2.0), *(np.zeros(shape) for shape in (5000, (1, 1), 1, (1, 1), 1)))
    with pytest.raises(ProtocolError, match="at most 4096 features"):
        ridge_path([wide])


@pytest.mark.parametrize(
    "errors",
    [
        {"errors": np.full((13, 1), np.nan)},
        {"errors": np.zeros((12, 1))},
        {"errors": np.zeros((13, 1), np.float32)},
        {"errors": -np.ones((13, 1))},
        {},
    ],
)
def test_errors_that_are_no_sums_of_squares_are_refused(errors):
    features, targets = draw(30, 4)
    path = ridge_path([LabelSums.of(features, targets)])
    with pytest.raises(ProtocolError):
        choose_penalty(path, [errors])


def test_a_path_that_is_none_is_refused_by_the_site():
    features, targets = draw(30, 4)
    path = ridge_path([LabelSums.of(features, targets)])
    for change in ({"scale": np.zeros(4)}, {"count": np.array(np.nan)}, {"axes": np.zeros((3, 4))}, {"axes": "text"}):
        arrays = {**path.to_arrays(), **{name: np.asarray(value) for name, value in change.items()}}
        with pytest.raises(ProtocolError):
            RidgePath.from_arrays(arrays, features=4, labels=1)
    foreign = replace(path, eigenvalues=path.eigenvalues * 1e-9)
    with pytest.raises(ProtocolError, match="found a leverage of 1 or more"):
        site_errors(features, {TASK: targets}, {TASK: foreign}, floor=1)


def test_of_equal_errors_the_strongest_penalty_is_taken():
    features, _ = draw(20, 3)
    path = ridge_path([LabelSums.of(features, np.ones((20, 1)))])
    probe, penalty = choose_penalty(path, [{"errors": np.zeros((13, 1))}])
    assert penalty == PENALTIES[-1]
    assert_allclose(probe.score(features), 1.0)


@pytest.mark.parametrize(("n", "d"), [(30, 4), (24, 60)])
def test_the_error_of_a_gate_is_generalised_cross_validation_on_all_patients(n, d):
    """By the hat matrix of everybody in one place."""
    features, targets = draw(n, d, labels=2)
    parts = split(features, targets, 3)
    sums = [site_sums(site.features, site.targets, floor=1).tasks[TASK] for site in parts]
    standard = StandardScaler().fit_transform(features.astype(np.float64))
    centred = targets - targets.mean(axis=0)
    errors = []
    for penalty in PENALTIES:
        hat = standard @ np.linalg.solve(standard.T @ standard + penalty * np.eye(d), standard.T) + 1 / n
        residual = ((targets - hat @ targets) ** 2).sum(axis=0)
        errors.append((n * residual / (n - np.trace(hat)) ** 2 / (centred**2).mean(axis=0)).mean())
    assert_allclose(cross_validated_error(sums), min(errors), rtol=1e-7)


def test_the_error_of_a_gate_without_use_or_variance():
    features, targets = draw(40, 3)
    noise = np.random.default_rng(5).integers(0, 2, (40, 1)).astype(np.float64)
    [useful, useless] = [cross_validated_error([LabelSums.of(features, given)]) for given in (targets, noise)]
    assert useful < 0.9 < useless < 1.2
    constant = LabelSums.of(features, np.ones((40, 1)))
    assert np.isnan(cross_validated_error([constant]))
    with_constant = LabelSums.of(features, np.hstack([targets, np.ones((40, 1))]))
    assert_allclose(cross_validated_error([with_constant]), useful)


def discriminant_of(sites, shrinkage):
    """The discriminant analyses of summed statistics."""
    sums = [LabelSums.of(site.features, site.targets[TASK]) for site in sites]
    return discriminants(ridge_path(sums), reduce(add, sums), shrinkage)


def test_a_discriminant_by_hand():
    """Classes at -2 and 2, variance 1 within: log-odds 4 x, plus those of three to one."""
    features = np.array([[-3.0], [-1.0], [1.0], [3.0], [1.0], [3.0], [1.0], [3.0]])
    targets = np.array([0, 0, 1, 1, 1, 1, 1, 1], float)[:, None]
    probe = discriminant_of(split(features, targets, 2), 0.0)
    assert_allclose(probe.score(np.array([[0.0], [1.0]]))[:, 0], [np.log(3), 4 + np.log(3)], atol=1e-12)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("num_sites", [1, 3])
def test_discriminants_are_those_of_scikit_learn_on_all_patients(shrinkage, num_sites):
    features, targets = draw(90, 7, labels=3, offset=40.0, spread=5.0)
    features[:, 2] = 1.5
    probe = discriminant_of(split(features, targets, num_sites), shrinkage)
    scaler = StandardScaler().fit(features.astype(np.float64))
    standard = scaler.transform(features.astype(np.float64))
    for column, target in enumerate(targets.T):
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None).fit(standard, target)
        expected = theirs.decision_function(standard)
        assert_allclose(probe.score(features)[:, column], expected, rtol=1e-6, atol=1e-6)


def test_with_more_features_than_patients_shrinkage_gives_a_solution():
    features, targets = draw(12, 30)
    probe = discriminant_of(split(features, targets, 2), 0.2)
    scaler = StandardScaler().fit(features.astype(np.float64))
    standard = scaler.transform(features.astype(np.float64))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(standard, targets[:, 0])
    assert_allclose(probe.score(features)[:, 0], theirs.decision_function(standard), rtol=1e-6, atol=1e-6)
    assert np.isnan(discriminant_of(split(features, targets, 2), 0.0).bias).all()


def test_only_labels_of_two_classes_have_a_discriminant():
    features, targets = draw(40, 4, labels=4)
    targets[:, 1], targets[:, 2] = 1.0, 0.0
    targets[:, 3] = np.linspace(0, 1, 40)
    probe = discriminant_of(split(features, targets, 2), 0.1)
    assert np.isfinite(probe.bias).tolist() == [True, False, False, False]
    assert np.isfinite(probe.weights).all()
    constant = discriminant_of(split(np.full((40, 4), 2.0), targets, 2), 0.1)
    assert np.isnan(constant.bias[1:]).all()
