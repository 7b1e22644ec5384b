"""The study of the Pan-FM paper's baselines: imputation, late fusion and the grid of missing organs by hand."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from panfm.data.store import ImageStore
from panfm.evaluate.probe_labels import LabelInfo
from panfm.evaluate.statistics import StatisticsReference, StreamStatistics
from simulations.cohorts.opened import OpenedCohort
from simulations.harness import ArmJob, CohortJob, StudyOptions
from simulations.studies import _pan_fm_arms
from simulations.studies import pan_fm_study as study
from simulations.studies._missing_organs import PartialModel, ProbeLabels, best_of, mean_of, organ_metrics
from simulations.studies._multi_label import label_loss
from simulations.studies._pan_fm_arms import TRAININGS, impute, late_fusion, some_subjects, with_streams

BRAIN, HEART, LIVER = "brain-mr", "heart-mr", "liver-mr"


def voxels(*values):
    """One image of a single voxel per value."""
    return np.array(values, np.float32).reshape(-1, 1, 1, 1, 1)


@pytest.fixture
def store():
    """Three patients: brain 1 and 3 of the first and last, heart 5 of the second."""
    images = {BRAIN: voxels(1, 3), HEART: voxels(5)}
    rows = {BRAIN: np.array([0, 2]), HEART: np.array([1])}
    return ImageStore(("a", "b", "c"), ("train", "val", "train"), images, rows)


def test_imputation_fills_what_is_missing(store):
    filled = impute(store, {BRAIN: voxels(2)[0], HEART: voxels(0)[0], LIVER: voxels(7)[0]})
    assert {stream: images.ravel().tolist() for stream, images in filled.images.items()} == {
        BRAIN: [1, 2, 3],
        HEART: [0, 5, 0],
        LIVER: [7, 7, 7],
    }
    assert all(rows.tolist() == [0, 1, 2] for rows in filled.rows.values())
    assert (filled.subjects, filled.splits) == (store.subjects, store.splits)


def test_an_organ_that_is_taken_away_is_filled_for_everyone(store):
    filled = impute(with_streams(store, (HEART,)), {BRAIN: voxels(2)[0], HEART: voxels(0)[0]})
    assert filled.images[BRAIN].ravel().tolist() == [2, 2, 2]
    assert filled.images[HEART].ravel().tolist() == [0, 5, 0]


def test_some_subjects_keep_their_own_images(store):
    some = some_subjects(store, np.array([1, 2]))
    assert some.subjects == ("b", "c")
    assert some.splits == ("val", "train")
    assert (some.images[BRAIN].ravel().tolist(), some.rows[BRAIN].tolist()) == ([3], [1])
    assert (some.images[HEART].ravel().tolist(), some.rows[HEART].tolist()) == ([5], [0])
    nobody = some_subjects(store, np.array([], dtype=np.int64))
    assert all(len(images) == 0 for images in nobody.images.values())
    assert list(some_subjects(store, np.array([0]), (HEART,)).images) == [HEART]


def test_a_single_organ_model_sees_the_holders_of_its_organ_at_the_sites_that_have_it(store, monkeypatch):
    """The site without brain gives no store, and thereby no steps."""
    without = with_streams(store, (HEART,))
    setting = SimpleNamespace(run="run", cohort=SimpleNamespace(stores={"a": store, "b": without}))
    monkeypatch.setattr(_pan_fm_arms, "train_together", lambda run, stores: stores)
    [holders] = _pan_fm_arms.train_on_stream(setting, BRAIN)
    assert (holders.subjects, list(holders.images)) == (("a", "c"), [BRAIN])
    assert len(_pan_fm_arms.train_on_stream(setting, HEART)) == 2


def test_random_masking_changes_the_policy_alone(monkeypatch):
    described = study.study_run(3, 4)

    def federate(run, folder):
        return SimpleNamespace(model=SimpleNamespace(stream_names=(BRAIN,), trained=(run, folder)))

    monkeypatch.setattr(_pan_fm_arms, "federate", federate)
    setting = SimpleNamespace(run=described, folder="cohort", probed=lambda model, streams: model.trained)
    assert TRAININGS["federated"](setting) == {"federated": (described, "cohort")}
    (run, _), *_ = TRAININGS["random-masking"](setting).values()
    assert run.masking.policy == "random"
    assert run.model_copy(update={"masking": described.masking}) == described


def statistics(rows, values):
    """Embeddings of two numbers of some patients."""
    return StreamStatistics(np.array(rows), np.array(values, np.float32))


def test_late_fusion_has_means_or_zeros_and_an_indicator():
    fit = {BRAIN: statistics([0, 1], [[1, 2], [3, 4]]), HEART: statistics([1], [[9, 8]])}
    everyone = np.arange(3)
    means = StatisticsReference.fit([(fit, everyone)])
    joined = late_fusion(means, fit, everyone, (BRAIN, HEART), with_indicator=False)
    assert joined.tolist() == [[1, 2, 9, 8], [3, 4, 9, 8], [2, 3, 9, 8]]
    zeros = StatisticsReference({stream: np.zeros_like(mean) for stream, mean in means.means.items()})
    joined = late_fusion(zeros, fit, everyone, (BRAIN, HEART), with_indicator=True)
    assert joined.tolist() == [[1, 2, 0, 0, 1, 0], [3, 4, 9, 8, 1, 1], [0, 0, 0, 0, 0, 0]]
    joined = late_fusion(zeros, fit, everyone, (HEART,), with_indicator=True)
    assert joined.tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 9, 8, 0, 1], [0, 0, 0, 0, 0, 0]]


INFO = {"stroke": LabelInfo("disease"), "eye": LabelInfo("category")}


def test_the_grid_by_hand():
    """Brain gives .2 of the first label, heart .1 of both, liver nothing; chance is .5."""
    given = {BRAIN: np.array([0.2, 0.0]), HEART: np.array([0.1, 0.1]), LIVER: np.zeros(2)}
    metrics = organ_metrics(
        lambda streams: 0.5 + np.sum([given[name] for name in streams], axis=0), tuple(given), INFO, draws=5, seed=0
    )
    assert metrics == pytest.approx(
        {
            "auc": 0.7,  # .8 and .6
            "auc_without_brain": 0.6,
            "auc_without_heart": 0.6,
            "auc_without_liver": 0.7,
            "auc_missing_1": (0.6 + 0.6 + 0.7) / 3,
            "auc_missing_2": (0.6 + 0.6 + 0.5) / 3,
            "auc_missing": 0.6,
            "disease": 0.8,
            "disease_missing": 0.65,  # (.6 + .7 + .8) / 3 and (.7 + .6 + .5) / 3
            "category": 0.6,
            "category_missing": 0.55,
            "label_stroke": 0.8,
            "label_missing_stroke": 0.65,
            "label_eye": 0.6,
            "label_missing_eye": 0.55,
        }
    )


def test_a_label_that_cannot_be_told_is_left_out_of_means():
    metrics = organ_metrics(lambda _: np.array([0.8, np.nan]), (BRAIN, HEART), INFO, draws=2, seed=0)
    assert (metrics["auc"], metrics["auc_missing"]) == pytest.approx((0.8, 0.8))
    assert np.isnan(metrics["category"])


def test_the_only_organ_cannot_be_taken_away():
    metrics = organ_metrics(lambda _: np.array([0.8, 0.6]), (BRAIN,), INFO, draws=2, seed=0)
    assert metrics["auc"] == pytest.approx(0.7)
    assert np.isnan(metrics["auc_missing"])


def test_models_that_read_none_of_the_organs_do_not_count():
    models = [
        PartialModel((BRAIN,), lambda _: np.array([0.9, 0.5])),
        PartialModel((BRAIN, HEART), lambda there: np.array([0.5, 0.8]) if HEART in there else np.array([0.5, 0.6])),
    ]
    assert mean_of(models)((BRAIN, HEART)).tolist() == pytest.approx([0.7, 0.65])
    assert mean_of(models)((HEART,)).tolist() == [0.5, 0.8]
    assert best_of(models)((BRAIN, HEART)).tolist() == [0.9, 0.5]
    assert best_of(models)((HEART,)).tolist() == [0.5, 0.8]


def test_the_probe_is_fitted_on_those_who_can_be_read():
    """The unusable half has the label turned round."""
    is_ill = np.tile([0.0, 1.0], 20)
    usable = np.arange(40) < 20
    labels = ProbeLabels(["ill"], np.where(usable, is_ill, 1 - is_ill)[:, None], np.array([[0.0], [1.0]]))
    auc_of = labels.probed(is_ill[:, None], lambda streams: np.array([[0.0], [1.0]]) * len(streams), usable)
    assert auc_of((BRAIN,)).tolist() == [1.0]
    assert auc_of(()).tolist() == [0.5]


def test_the_supervised_loss_leaves_unknown_labels_out():
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = label_loss(logits, torch.tensor([[1.0, float("nan")], [0.0, float("nan")]]))
    assert loss.item() == pytest.approx(np.log(2))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.25, 0.0], [0.25, 0.0]]
    assert label_loss(logits, torch.full((2, 2), float("nan"))).item() == 0.0


def metrics_of(auc, missing):
    """All metrics of an arm that are shown or compared."""
    return dict.fromkeys(study.SHOWN, auc) | {"auc_missing": missing}


def test_targets_are_of_the_mean_with_organs_missing(monkeypatch):
    def run_arms(options, trainings, length, write_draw, measure):
        assert (trainings, length) == ([f"cls/{training}" for training in TRAININGS], 30)
        for draw, seed in options.pairs():
            measured = {}
            for arm in study.ARMS:
                missing = {"federated": 0.65, "late-fusion": 0.6 + 0.12 * seed}.get(arm, 0.6)
                measured |= {f"{arm}/{name}": value for name, value in metrics_of(0.7, missing).items()}
            yield ArmJob(draw, seed, "all", length, None), measured

    monkeypatch.setattr(study, "run_arms", run_arms)
    result = study.run(StudyOptions(seeds=2, draws=None), "cls")
    assert result.config["pairs"] == [(0, 0), (1, 1)]
    assert result.config["run"]["features"]["pooling"] == "cls"
    assert [target.is_met for target in result.targets] == [arm != "late-fusion" for arm in study.BASELINES]
    assert result.ratios["auc_missing/federated-minus-late-fusion"] == pytest.approx(-0.01)
    assert result.ratios["auc/federated-minus-centralised"] == 0.0
    console = Console(width=200, file=io.StringIO())
    study.show(result, console)
    assert "MISSED" in console.file.getvalue()


@pytest.mark.slow
def test_all_trainings_of_a_small_cohort(tmp_path, monkeypatch):
    """One round of two steps, in which masks are not guided yet: all arms are measured, and all others differ."""
    described = study.study_run

    def small_run(draw, seed, changes=()):
        return described(draw, seed, [*changes, "train.local-steps=2", "train.batch-size=8"])

    def open_with_few_labels(folder, run):
        opened = OpenedCohort.open(folder, run)
        return replace(opened, labels={name: opened.labels[name] for name in ("mental", "circulatory", "hypertension")})

    monkeypatch.setattr(study, "study_run", small_run)
    monkeypatch.setattr(study, "OpenedCohort", SimpleNamespace(open=open_with_few_labels))
    monkeypatch.setattr(study, "DRAWS", 1)
    cohort = study.write_draw(CohortJob(100, tmp_path / "cohort", subjects=24, holdout=24))
    arms = {}
    for training in TRAININGS:
        arms |= study.by_arm(study.measure(ArmJob(100, 100, f"{study.POOLINGS[0]}/{training}", 1, cohort)))
    assert set(arms) == set(study.ARMS)
    assert len({tuple(sorted(values)) for values in arms.values()}) == 1
    for arm, values in arms.items():
        assert np.isfinite(list(values.values())).all(), arm
    del arms["random-masking"]
    assert len({tuple(values.values()) for values in arms.values()}) == len(arms)
