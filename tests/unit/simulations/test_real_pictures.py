"""The study of real pictures: draws of labels, the probe, arms that differ in their training alone."""

import os

import numpy as np
import pytest
import torch

from panfm.data.store import Batch
from panfm.models import build_model
from simulations.cohorts.opened import OpenedCohort
from simulations.harness import ArmJob, CohortJob, StudyOptions
from simulations.studies import _class_probe
from simulations.studies import real_pictures_study as study
from simulations.studies._start_arms import EXPERIMENT

needs_pictures = pytest.mark.skipif("PANFM_REAL_DATA" not in os.environ, reason="PANFM_REAL_DATA is not set")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return study.write_draw(CohortJob(0, tmp_path_factory.mktemp("real") / "cohort"))


def test_pooling_is_cls_and_the_mean_of_every_block(make_run, make_store):
    run = make_run()
    model, store = build_model(run), make_store(run, 3, complete=True)
    batch: Batch = store.batch(np.arange(3), ["eye-fundus"])
    with torch.inference_mode():
        encoded = model.encode(model.patch_features(batch), keep_blocks=True)
        found = study.pooled(model, batch)
    assert found.shape == (3, 48 * 3)
    assert torch.equal(found[:, :48], encoded.cls)
    assert torch.allclose(found[:, 96:], encoded.blocks[-1].mean(dim=1))


@pytest.fixture
def one_draw(monkeypatch):
    monkeypatch.setattr(_class_probe, "LABEL_DRAWS", dict.fromkeys((5, 20, 100), 1))


@needs_pictures
@pytest.mark.slow
@pytest.mark.parametrize("arm", ["statistics", "untrained"])
def test_an_arm_without_training(cohort, one_draw, arm):
    measured = study.measure(ArmJob(0, 3, arm, 1, cohort))
    streams = ("abdomen-ct", "breast-ultrasound", "chest-xray")
    expected = {f"auc_{name}_{percent}" for name in (*streams, "mean") for percent in (5, 20, 100)}
    assert measured.keys() == expected
    assert all(0.4 < value <= 1.0 for value in measured.values())
    means = [np.mean([measured[f"auc_{name}_{percent}"] for name in streams]) for percent in (5, 20, 100)]
    assert [measured[f"auc_mean_{percent}"] for percent in (5, 20, 100)] == pytest.approx(means)


@needs_pictures
@pytest.mark.slow
def test_trained_arms_after_one_short_round(cohort, one_draw, monkeypatch):
    short = study.load_simulation(EXPERIMENT, ["train.rounds=1", "train.local-steps=2"])
    monkeypatch.setattr(study, "arm_run", lambda arm, seed, rounds: short)
    models = {arm: study.measure(ArmJob(0, 0, arm, 1, cohort)) for arm in ("untrained", "views", "views-alone")}
    assert models["untrained"] != models["views"] != models["views-alone"]
    opened = OpenedCohort.open(cohort, short)
    assert study.probed_streams(opened) == ["abdomen-ct", "breast-ultrasound", "chest-xray"]


def test_answers_and_targets_of_the_whole_study(monkeypatch):
    """Views are ahead of untrained by .03, level in one of three cells of a seed."""

    def run_arms(options, arms, length, write_draw, measure):
        gain = {"views": 0.03, "views-alone": 0.01}
        for draw, seed in options.pairs():
            for arm in arms:
                cells = {
                    f"auc_chest-xray_{percent}": 0.7 + gain.get(arm, 0.0) * (percent != 5) for percent in (5, 20, 100)
                }
                means = {f"auc_mean_{percent}": cells[f"auc_chest-xray_{percent}"] for percent in (5, 20, 100)}
                yield ArmJob(draw, seed, arm, length, None), cells | means

    monkeypatch.setattr(study, "run_arms", run_arms)
    result = study.run(StudyOptions(seeds=2), 1)
    assert result.ratios["cells/views-minus-untrained"] == pytest.approx(0.02)
    assert result.ratios["cells/views-at-least-untrained"] == 1.0
    assert result.ratios["auc_mean_20/views-minus-views-alone"] == pytest.approx(0.02)
    assert len(result.targets) == 2
    study.show(result)


def test_rows_of_a_public_start_and_their_targets(monkeypatch):
    """The readout gains .03; adaptation loses .02 in one of two streams."""

    def run_arms(options, arms, length, write_draw, measure):
        level = {"statistics": 0.6, "start": 0.7, "adapted": 0.7}
        for draw, seed in options.pairs():
            for arm in arms:
                cells = {f"auc_{name}_{percent}": level[arm] for name in ("ct", "xray") for percent in (5, 20, 100)}
                cells |= {f"auc_mean_{percent}": level[arm] for percent in (5, 20, 100)}
                loss = {name: 0.02 * (arm == "adapted" and name.startswith("auc_ct")) for name in cells}
                readout = {f"-readout:{name}": value + 0.03 - loss[name] for name, value in cells.items()}
                cells["heldout_ct_5"], readout["-readout:heldout_ct_5"] = 0.7, 0.8 - 0.01 * (arm == "adapted")
                yield ArmJob(draw, seed, arm, length, None), cells | readout

    monkeypatch.setattr(study, "run_arms", run_arms)
    monkeypatch.setattr(study, "arm_run", lambda arm, seed, rounds: study.load_simulation(EXPERIMENT))
    result = study.run(StudyOptions(seeds=2), 1, ["statistics", "start", "adapted"])
    assert study.measured_rows(result) == ["statistics", "start", "start-readout", "adapted", "adapted-readout"]
    assert result.values["auc_ct_5", "adapted-readout"] == pytest.approx([0.71, 0.71])
    assert [target.value for target in result.targets] == pytest.approx([0.03, 0.13, -0.01, -0.02, -0.01])
    assert [target.is_met for target in result.targets] == [True, True, False, False, False]
    study.show(result)
