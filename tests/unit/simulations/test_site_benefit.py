"""The models that a site could keep, on its own patients: scores, paired differences, and what the sentences say."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from panfm.config import parse_run
from panfm.data.store import ImageStore
from panfm.evaluate.embed import embed_store
from panfm.evaluate.probe_cohort import Task
from panfm.evaluate.probe_labels import LabelInfo, LabelledStore
from panfm.evaluate.result import GAIN, ProbeResult, Score, read_result, write_result
from panfm.evaluate.site_score import probed
from panfm.models import build_model
from panfm.report.console_tables import contract_lines, contract_rows
from simulations import site_benefit
from tests.conftest import SMALL_RUN

TWO_STREAMS = """
name = "two"
[streams]
eye-fundus = { shape = [8, 8], patch = [4, 4] }
chest-xray = { shape = [8, 8], patch = [4, 4] }
"""
N, TRAIN = 120, 80
RANDOM = np.random.default_rng(1)
SICK = RANDOM.integers(0, 2, N).astype(float)
GOOD, BAD = SICK[:, None] + RANDOM.normal(size=(N, 1)), RANDOM.normal(size=(N, 1))
MODELS = {
    name: SimpleNamespace(features=features)
    for name, features in {"federated": GOOD, "site:a": BAD, "untrained": BAD[::-1]}.items()
}


@pytest.fixture(autouse=True)
def features(monkeypatch):
    def embed(models, _, at):
        return {arm: model.features[at] for arm, model in models.items()}

    monkeypatch.setattr(site_benefit, "embed_models", embed)


def task(labels, splits=("train",) * TRAIN + ("val",) * 20 + ("test",) * (N - TRAIN - 20), number=False):
    store = ImageStore(tuple(map(str, range(N))), splits, {}, {})
    info = {name: LabelInfo("volume" if number else "disease") for name in labels}
    return Task(parse_run(SMALL_RUN), [LabelledStore(store, labels, "a")], LabelledStore(store, {}), info)


def scores(given, personalised=None):
    return {score.arm: score for score in site_benefit.site_benefits(given, MODELS, personalised or {})}


def test_scores_are_those_of_a_probe_on_patients_outside_training():
    told = scores(task({"sick": SICK}))
    predicted = probed(GOOD, SICK[:, None], np.arange(TRAIN))[TRAIN:]
    assert told["federated"].value == pytest.approx(roc_auc_score(SICK[TRAIN:], predicted[:, 0]))
    own = probed(BAD, SICK[:, None], np.arange(TRAIN))[TRAIN:]
    assert told["ensemble"].value == pytest.approx(roc_auc_score(SICK[TRAIN:], (predicted + own)[:, 0]))
    gain = told[f"federated{GAIN}"]
    assert gain.value == pytest.approx(told["federated"].value - told["site:a"].value)
    assert 0 < gain.low < gain.value < gain.high
    assert {score.group for score in told.values()} == {"site:a"}


def test_equal_models_have_a_difference_of_nothing_in_every_resample():
    told = scores(task({"sick": SICK}), {"a": MODELS["site:a"]})
    gain = told[f"personalised{GAIN}"]
    assert (gain.value, gain.low, gain.high) == (0.0, 0.0, 0.0)


def test_unknown_labels_and_labels_of_one_class_are_left_out():
    some = np.where(np.arange(N) % 3, SICK, np.nan)
    flat = np.where(np.arange(N) < TRAIN, SICK, 1.0)
    told = scores(task({"sick": SICK, "some": some, "flat": flat, "absent": np.full(N, np.nan)}))
    assert told["federated"].num_labels == 2
    assert scores(task({"flat": flat})) == {}


def test_without_patients_outside_training_all_are_cross_validated():
    told = scores(task({"sick": SICK}, splits=("train",) * N))
    assert 0.6 < told["federated"].value < 1.0
    assert told["site:a"].value < 0.7


def test_numbers_are_scored_by_r2_where_there_are_no_classes():
    told = scores(task({"age": GOOD[:, 0] * 3 + 50}, number=True))
    assert told["federated"].metric == "r2"
    assert told["federated"].value > 0.9


def test_features_are_those_of_each_model_by_itself(monkeypatch):
    """A model of all streams and one of some, with constants of its own, read the same patients."""
    run = parse_run(TWO_STREAMS)
    fundus = run.streams["eye-fundus"].model_copy(update={"input_centre": (0.4,), "input_scale": (2.0,)})
    other = run.model_copy(update={"streams": {**run.streams, "eye-fundus": fundus}})
    models = {"federated": build_model(run), "site:a": build_model(run, ["eye-fundus"]), "start": build_model(other)}
    images = RANDOM.random((3, 1, 8, 8)).astype(np.float32)
    store = ImageStore(("x", "y", "z"), ("train",) * 3, {"eye-fundus": images}, {"eye-fundus": np.arange(3)})
    monkeypatch.undo()
    told = site_benefit.embed_models(models, store, np.array([0, 2]))
    for arm, model in models.items():
        expected = embed_store(model, store, np.array([0, 2]), ["eye-fundus"])
        np.testing.assert_array_equal(told[arm], expected)
    assert not np.array_equal(told["federated"], told["start"])


def benefit(*gains):
    given = [Score("site:a", "site:a", "auc", 0.6, 0.5, 0.7, 1)]
    for arm, low, high in gains:
        given.append(Score(arm, "site:a", "auc", 0.7, 0.6, 0.8, 1))
        given.append(Score(f"{arm}{GAIN}", "site:a", "auc", (low + high) / 2, low, high, 1))
    return ProbeResult((), {}, {}, {}, benefit=tuple(given))


@pytest.mark.parametrize(
    ("gains", "line"),
    [
        ([("federated", 0.01, 0.07)], "a: keep the federated model: AUC +.040 [+.010, +.070] over its own."),
        (
            [("federated", -0.01, 0.05), ("ensemble", 0.01, 0.03)],
            "a: keep the ensemble with the federated model: AUC +.020 [+.010, +.030] over its own.",
        ),
        (
            [("federated", -0.07, -0.01), ("ensemble", -0.01, 0.01)],
            "a: keep its own model: the federated model has AUC -.040 [-.070, -.010] against it.",
        ),
        (
            [("federated", -0.01, 0.05), ("ensemble", -0.01, 0.01), ("untrained", 0.1, 0.2)],
            "a: no difference shown between the federated model and its own (AUC +.020 [-.010, +.050]).",
        ),
        (
            [("federated", 0.01, 0.03), ("ensemble", 0.01, 0.09), ("start", 0.0, 0.2)],
            "a: keep the ensemble with the federated model: AUC +.050 [+.010, +.090] over its own.",
        ),
        (
            [("federated", -0.07, -0.01), ("start", 0.02, 0.06)],
            "a: keep the model that the run started from: AUC +.040 [+.020, +.060] over its own.",
        ),
    ],
)
def test_a_site_keeps_the_model_with_the_greatest_gain_of_those_above_nothing(gains, line):
    assert list(contract_lines(benefit(*gains))) == [line]


def test_a_row_per_site_without_differences_and_the_file_keeps_them(tmp_path):
    result = benefit(("federated", 0.01, 0.07))
    assert contract_rows(result) == (["own", "federated"], [("a", ".600 [.500, .700]", ".700 [.600, .800]")])
    write_result(tmp_path / "probe.json", result)
    assert read_result(tmp_path / "probe.json") == result
