"""Arms of a public start: without weights, with small random ones, and the streams read apart."""

import numpy as np
import pytest
import torch
import typer

from panfm.config.features import FeaturesConfig
from panfm.evaluate.embed import embed_store
from panfm.evaluate.probe_labels import LabelledStore
from panfm.models import build_model
from panfm.privacy.mechanisms import Mechanism, epsilon
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import WEIGHTS
from simulations.harness import ArmJob, CohortJob
from simulations.studies import _class_probe
from simulations.studies import _start_arms as arms
from simulations.studies import real_pictures_study as study
from simulations.studies._federations import federated
from simulations.studies._round_gate import kept_round, round_models
from tests.unit.simulations.test_real_pictures import needs_pictures


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.delenv(WEIGHTS, raising=False)


def change_start_runs(monkeypatch, *changes):
    """Change all runs with a public start."""
    plain = arms.start_run

    def changed(seed, arm="start", more=()):
        return plain(seed, arm, (*changes, *more))

    monkeypatch.setattr(arms, "start_run", changed)


@pytest.fixture
def small_weights(nano_weights, monkeypatch):
    """A nano model, which is read by both of its blocks and adapted for two steps."""
    nano = 'model={ size = "nano", tokenizer = "patch", positions = "learned", layer-scale = true }'
    parts = 'train.parts={ kind = "last-blocks", blocks = 1 }'
    for arm in ("adapted", arms.PRIVATE):
        short = (*arms.ADAPTATIONS[arm], "train.rounds=1", "train.local-steps=2")
        monkeypatch.setitem(arms.ADAPTATIONS, arm, short)
    change_start_runs(monkeypatch, nano, parts, 'features.pooling="cls+mean"', "features.layers=[]")
    monkeypatch.setattr(arms, "FROZEN_BLOCKS", 1)
    readout = FeaturesConfig(pooling="layers", layers=(1, 2), whitening=True, whitening_crops=20)
    monkeypatch.setattr(arms, "READINGS", arms.READINGS | {"-readout": readout})
    monkeypatch.setattr(_class_probe, "LABEL_DRAWS", dict.fromkeys((5, 20, 100), 1))


def test_without_weights_the_other_arms_go_on_and_one_line_says_so(no_weights, capsys):
    assert arms.possible_arms(study.ARMS, study.SCRATCH_ARMS) == ["statistics", "untrained", "views", "views-alone"]
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"PANFM_WEIGHTS is not set: left out {', '.join(study.ARMS[len(study.SCRATCH_ARMS) :])}"
    assert arms.possible_arms(["views"], study.SCRATCH_ARMS) == ["views"]
    assert capsys.readouterr().err == ""


def test_without_weights_nothing_is_left_of_public_arms_alone(no_weights):
    with pytest.raises(typer.BadParameter, match="start, adapted: need PANFM_WEIGHTS"):
        arms.possible_arms(["start", "adapted"], study.SCRATCH_ARMS)


def test_with_weights_all_arms_are_possible(nano_weights):
    assert arms.possible_arms(study.ARMS, study.SCRATCH_ARMS) == [*study.ARMS]


def test_the_readings():
    assert list(arms.READINGS) == ["", "-readout"]
    assert arms.READINGS[""].pooling_text == "cls+mean"
    assert not arms.READINGS[""].whitening
    readout = arms.READINGS["-readout"]
    assert (readout.pooling_text, readout.whitening, readout.whitening_lambda) == ("layers:8,10,12", True, 1.0)


def test_the_runs_of_the_adaptations(nano_weights):
    run = arms.start_run(7)
    assert run.seed == 7
    assert run.start.public
    assert run.train.learning_rate == 1e-4
    assert run.sharing.head == "private"
    assert {(stream.shape, stream.patch) for stream in run.streams.values()} == {((84, 84), (14, 14))}
    attention = arms.start_run(7, "adapted-attention").train
    assert (attention.parts.kind, attention.parts.blocks) == ("attention-projections", 4)
    private = arms.start_run(7, arms.PRIVATE)
    assert private.patient_dp.epsilon == 8.0
    assert (private.objective.name, private.train.parts.frozen_a) == ("view-regression", True)


@pytest.mark.slow
def test_the_noise_of_the_private_arm_is_what_its_steps_need(nano_weights):
    run = arms.start_run(0, arms.PRIVATE)
    private, steps = run.patient_dp, run.train.rounds * run.train.local_steps
    needed = epsilon(
        (Mechanism("gradients", (), 1.0, private.noise_multiplier, private.sample_rate, steps),), private.delta
    )
    assert private.epsilon - 0.2 < needed <= private.epsilon


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


def test_a_remembered_prefix_changes_no_bit(make_run, make_store, monkeypatch):
    monkeypatch.setattr(arms, "FROZEN_BLOCKS", 1)
    run = make_run()
    model, store, memory = build_model(run), make_store(run, 4, complete=True), {}
    features = FeaturesConfig(pooling="layers", whitening=True, whitening_crops=12)
    stream = next(iter(run.streams))
    plain = arms.StreamReader(model, run, features, one_site(run, store))(store, stream, np.arange(4))
    for _ in range(2):
        remembered = arms.StreamReader(model, run, features, one_site(run, store), memory)
        np.testing.assert_array_equal(remembered(store, stream, np.arange(4)), plain)
    assert len(memory) == 3, "pictures, and the crops of the whitening with their pictures"


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


def both_ways(metrics):
    return metrics | {f"-readout:{name}" for name in metrics}


@needs_pictures
@pytest.mark.slow
def test_the_arms_end_to_end(small_weights, tmp_path):
    names = ("start", "adapted", arms.PRIVATE, "adapted-heldout")
    cohort = study.write_draw(CohortJob(0, tmp_path / "cohort"), names)
    measured = {arm: study.measure(ArmJob(0, 3, arm, 1, cohort)) for arm in names}
    held_out = {f"heldout_{arms.HELD_OUT}_{percent}" for percent in (5, 20, 100)}
    streams = ("abdomen-ct", "breast-ultrasound", "chest-xray", "mean")
    metrics = {f"auc_{name}_{percent}" for name in streams for percent in (5, 20, 100)}
    assert measured["start"].keys() == both_ways(metrics | held_out)
    assert measured["adapted"].keys() == both_ways(metrics) | {"rounds_kept"}
    assert measured[arms.PRIVATE].keys() == measured["adapted"].keys()
    assert measured["adapted-heldout"].keys() == both_ways(held_out) | {"rounds_kept_heldout"}
    assert all(0.3 < measured["adapted"][metric] <= 1.0 for metric in metrics)
    assert measured["adapted"]["rounds_kept"] in (0, 1)
    start = measured["start"]
    assert start[f"heldout_{arms.HELD_OUT}_20"] == start[f"auc_{arms.HELD_OUT}_20"]
    opened = OpenedCohort.open(arms.folder_without(cohort, arms.HELD_OUT), arms.start_run(0))
    assert arms.HELD_OUT not in opened.stores["breast-clinic"].images


@needs_pictures
@pytest.mark.slow
def test_the_rounds_that_the_gate_judges(small_weights, tmp_path):
    cohort = study.write_draw(CohortJob(0, tmp_path / "cohort"), ["start"])
    run = arms.start_run(3, "adapted")
    with federated(run, cohort) as folder:
        (first, start), (second, adapted) = round_models(folder)
        assert (first, second) == (0, 1)
        assert kept_round(folder, lambda model: 0.5).number == 0
        better = iter((0.5, 0.4))
        assert kept_round(folder, lambda model: next(better)).number == 1
    start, adapted = start.state_dict(), adapted.state_dict()
    same = {name for name, value in start.items() if torch.equal(value, adapted[name])}
    assert {name for name in start if name.startswith(("streams.", "backbone.blocks.0."))} <= same
    assert not {name for name in start if name.startswith("backbone.blocks.1.") and name.endswith("weight")} <= same
