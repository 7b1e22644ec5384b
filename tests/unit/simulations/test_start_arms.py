"""Arms of a public start: without weights, with small random ones, and the streams read apart."""

import numpy as np
import pytest
import safetensors.torch
import torch
import typer

from panfm.config.features import FeaturesConfig
from panfm.evaluate.embed import embed_store
from panfm.evaluate.probe_labels import LabelledStore
from panfm.models import build_model
from simulations.cohorts.opened import OpenedCohort
from simulations.harness import ArmJob, CohortJob
from simulations.studies import _start_arms as arms
from simulations.studies import real_pictures_study as study
from tests.unit.models.test_public_weights import random_dinov2
from tests.unit.simulations.test_real_pictures import needs_pictures


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.delenv(arms.ENVIRONMENT, raising=False)


@pytest.fixture
def small_weights(tmp_path, monkeypatch):
    """Random weights of a nano model, which is read by both of its blocks and adapted for two steps."""
    safetensors.torch.save_file(random_dinov2(patch=14), tmp_path / "vit.safetensors")
    monkeypatch.setenv(arms.ENVIRONMENT, str(tmp_path / "vit.safetensors"))
    nano = 'model={ size = "nano", tokenizer = "patch", positions = "learned", layer-scale = true }'
    parts = 'train.parts={ kind = "last-blocks", blocks = 1 }'
    monkeypatch.setattr(arms, "CHANGES", (*arms.CHANGES, nano, parts, "train.rounds=1", "train.local-steps=2"))
    readout = FeaturesConfig(pooling="layers", layers=(1, 2), whitening=True, whitening_crops=20)
    monkeypatch.setattr(arms, "READINGS", arms.READINGS | {"-readout": readout})
    monkeypatch.setattr(study, "LABEL_DRAWS", dict.fromkeys((5, 20, 100), 1))


def test_without_weights_the_other_arms_go_on_and_one_line_says_so(no_weights, capsys):
    assert study.possible_arms(study.ARMS) == ["statistics", "untrained", "views", "views-alone"]
    [line] = capsys.readouterr().err.splitlines()
    assert line == "PANFM_WEIGHTS is not set: left out start, start-readout, adapted, adapted-readout"
    assert study.possible_arms(["views"]) == ["views"]
    assert capsys.readouterr().err == ""


def test_without_weights_nothing_is_left_of_public_arms_alone(no_weights):
    with pytest.raises(typer.BadParameter, match="start, adapted: need PANFM_WEIGHTS"):
        study.possible_arms(["start", "adapted"])


def test_with_weights_all_arms_are_possible(small_weights):
    assert study.possible_arms(study.ARMS) == [*study.ARMS]


def test_the_readings():
    assert list(arms.READINGS) == ["", "-readout"]
    assert arms.READINGS[""].pooling_text == "cls+mean"
    assert not arms.READINGS[""].whitening
    readout = arms.READINGS["-readout"]
    assert (readout.pooling_text, readout.whitening, readout.whitening_lambda) == ("layers:8,10,12", True, 1.0)


def test_the_run_of_the_adaptation(small_weights):
    run = arms.start_run(study.EXPERIMENT, 7)
    assert run.seed == 7
    assert run.start.public
    assert run.train.learning_rate == 1e-4
    assert run.sharing.head == "private"
    assert {(stream.shape, stream.patch) for stream in run.streams.values()} == {((84, 84), (14, 14))}


def one_site(run, store):
    return OpenedCohort({"clinic": LabelledStore(store, {})}, LabelledStore(store, {}), {})


def test_a_stream_read_apart_has_the_features_of_the_whole_model(make_run, make_store):
    run = make_run()
    model, store = build_model(run), make_store(run, 4, complete=True)
    features = FeaturesConfig(pooling="cls+mean")
    whole = build_model(run.model_copy(update={"features": features}))
    reader = arms.StreamReader(model, run, features, one_site(run, store))
    for stream in run.streams:
        expected = embed_store(whole, store, np.arange(4), [stream])
        np.testing.assert_allclose(reader(store, stream, np.arange(4)), expected, rtol=1e-5, atol=1e-6)


def test_the_whitening_is_fitted_on_training_pictures_of_the_site_alone(make_run, make_store):
    run = make_run()
    model, store, others = build_model(run), make_store(run, 6), make_store(run, 3, seed=1, complete=True)
    features = FeaturesConfig(pooling="cls+mean", whitening=True, whitening_crops=12)
    stream = next(iter(run.streams))
    apart, after = (arms.StreamReader(model, run, features, one_site(run, store)) for _ in range(2))
    first = apart(others, stream, np.arange(3))
    after(store, stream, np.arange(1))
    np.testing.assert_array_equal(after(others, stream, np.arange(3)), first)
    plain = arms.StreamReader(model, run, FeaturesConfig(pooling="cls+mean"), one_site(run, store))
    assert not np.allclose(plain(others, stream, np.arange(3)), first)


@needs_pictures
@pytest.mark.slow
def test_the_arms_end_to_end(small_weights, tmp_path):
    cohort = study.write_draw(CohortJob(0, tmp_path / "cohort"), study.possible_arms(arms.ARMS))
    measured = {arm: study.measure(ArmJob(0, 3, arm, 1, cohort)) for arm in arms.ARMS}
    streams = ("abdomen-ct", "breast-ultrasound", "chest-xray", "mean")
    metrics = {f"auc_{name}_{percent}" for name in streams for percent in (5, 20, 100)}
    for values in measured.values():
        assert values.keys() == metrics | {f"-readout:{metric}" for metric in metrics}
        assert all(0.3 < value <= 1.0 for value in values.values())
    assert measured["start"] != measured["adapted"]
    run = arms.start_run(study.EXPERIMENT, 3)
    start, adapted = (arms.model_of(arm, run, cohort).state_dict() for arm in arms.ARMS)
    same = {name for name, value in start.items() if torch.equal(value, adapted[name])}
    assert {name for name in start if name.startswith(("streams.", "backbone.blocks.0."))} <= same
    assert not {name for name in start if name.startswith("backbone.blocks.1.") and name.endswith("weight")} <= same
