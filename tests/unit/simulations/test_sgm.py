"""The study of masking policies, at a size that takes seconds."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from panfm.models.patch_features import image_features
from panfm.training.gradient import BatchGradient
from panfm.training.trainer import Trainer
from simulations.cohorts.phantom_draw import Phantom
from simulations.harness import ArmJob, StudyOptions
from simulations.studies import sgm_study as sgm
from simulations.studies._phantoms import Cohort, phantom_store, render_draw
from simulations.study_result import StudyResult, Target

BOTH = ("transient", "lasting")
ORGANS = ("brain", "heart", "adipose", "liver", "kidney", "spleen", "pancreas")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, run = tmp_path_factory.mktemp("draw"), sgm.study_run(0, "random", 1)
    render_draw(
        folder / "transient", Phantom("transient", 100), run.streams, run.organs, train_subjects=80, test_subjects=60
    )
    return folder


def measure(folder, arm, recipe="plain"):
    return sgm.measure(ArmJob(100, 100, f"{recipe}/transient/{arm}", 2, folder))


@pytest.mark.slow
def test_bounds_are_read_from_the_factors_that_the_labels_are_drawn_from():
    """The labels' own score beats a linear probe of the factors, which loses little."""
    run, phantom = sgm.study_run(0, "random", 1), Phantom("transient", 100)
    train, test = phantom.draw("train", 400, run.organs), phantom.draw("test", 300, run.organs, complete=True)
    cohort = Cohort(
        SimpleNamespace(subjects=train.names),
        SimpleNamespace(subjects=test.names),
        train.labels.astype(float),
        test.labels.astype(float),
    )
    oracle, latents = (sgm._measure_bound(arm, phantom, cohort, run) for arm in sgm.BOUNDS)
    assert oracle.keys() == latents.keys() == {"auc", "auc_weak"}
    assert 0.85 < latents["auc"] < oracle["auc"] < 0.92


def test_references_alone_are_compared_with_nothing(monkeypatch):
    def run_arms(options, arms, length, write_draw, measure):
        for arm in arms:
            yield ArmJob(0, 0, arm, length, None), {"auc": 0.9, "auc_weak": 0.8}

    monkeypatch.setattr(sgm, "run_arms", run_arms)
    result = sgm.run(StudyOptions(seeds=1, draws=1), "short", sgm.BOUNDS, ["transient"])
    assert (result.ratios, result.targets) == ({}, [])
    sgm.show(result)


@pytest.mark.slow
def test_every_metric_is_measured(folder):
    of_probes = {"auc", "auc_weak", "auc_no_dominant", "effective_rank"}
    of_probes |= {f"auc_missing_{count}" for count in range(1, 7)}
    of_probes |= {f"{metric}_{organ}" for metric in ("auc_drop", "auc_only") for organ in ORGANS}
    found = {arm: measure(folder, arm) for arm in ("untrained", "sgm", "statistics")}
    assert found["statistics"].keys() == of_probes
    assert found["sgm"].keys() == found["untrained"].keys() == of_probes | {"saliency_entropy"}
    assert all(math.isfinite(value) for measured in found.values() for value in measured.values())
    assert found["untrained"] == measure(folder, "untrained") != found["sgm"]
    for measured in found.values():
        assert measured["auc_drop_heart"] == pytest.approx(
            measured["auc"] - 7 * measured["auc_missing_1"] + sum(_without(measured, "heart"))
        )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["latent", "dino", "view-regression"])
def test_every_recipe_trains_on_scaled_inputs(folder, recipe):
    found = [measure(folder, arm, recipe) for arm in ("untrained", "sgm")]
    assert found[0] != found[1]
    assert found[0] != measure(folder, "untrained")
    assert all(math.isfinite(value) for measured in found for value in measured.values())


def test_scaled_inputs_have_mean_zero_and_deviation_one():
    run = sgm.study_run(0, "random", 1, "latent")
    phantom = Phantom("shortcut", 100)
    store = phantom_store(phantom, phantom.draw("train", 6, run.organs, complete=True), run.streams)
    changed = sgm.scaled(run, store)
    for name, stream in changed.streams.items():
        features = image_features(torch.from_numpy(store.images[name]), stream, run.model.tokenizer).transpose(0, 1)
        assert features.flatten(1).mean(dim=1).abs().max() < 1e-2
        assert (features.flatten(1).std(dim=1) - 1.0).abs().max() < 1e-2
    assert changed.augment is not None
    assert changed.train.teacher_momentum == "auto"


def test_under_views_saliency_changes_no_mask(make_run, make_store):
    """A batch shows one stream, so all of its tokens have one score."""
    views = '[objective]\nname = "views"\n[augment]\n[masking]\npolicy = "{}"\n'
    masks = {}
    for policy in ("random", "sgm"):
        trainer = Trainer(make_run(views.format(policy)))
        trainer.profile = torch.tensor([4.0, 0.5, 0.2])
        store = make_store(trainer.run)
        source = BatchGradient(trainer, trainer.experts, store, np.arange(12), site="a", round_number=1)
        outputs = [trainer.forward(next(source.draw()), step, moves_profile=True) for step in range(3)]
        masks[policy] = [output.student.mask.hidden.patch_index for output in outputs]
    assert all(torch.equal(*pair) for pair in zip(masks["random"], masks["sgm"], strict=True))


def _without(measured, organ):
    return [measured["auc"] - measured[f"auc_drop_{other}"] for other in ORGANS if other != organ]


def test_arms_differ_in_their_masks_alone():
    runs = {arm: sgm.study_run(3, arm, 40) for arm in sgm.MASKING}
    assert {arm: run.masking.policy for arm, run in runs.items()} == {
        "random": "random", "organ": "organ", "sgm-attention": "sgm", "sgm-value": "sgm", "sgm": "sgm",
        "inverse": "inverse", "static": "static",
    }  # fmt: skip
    assert runs["sgm-attention"].masking.saliency == "attention"
    assert runs["sgm-value"].masking.saliency == runs["sgm"].masking.saliency == "value"
    assert len({run.masking.ratio for run in runs.values()}) == 1
    assert len({run.model_copy(update={"masking": None}).model_dump_json() for run in runs.values()}) == 1


def made_up(gains):
    """A result in which `sgm` is ahead of `random`, which has .5 everywhere, by these gains per metric."""
    result = StudyResult("sgm", {})
    for metric, values in gains.items():
        result.values[metric, "random"] = [0.5] * len(values)
        result.values[metric, "sgm"] = [0.5 + value for value in values]
        result.values[metric, "statistics"] = [0.505] * len(values)
    return result


def verdicts(result, budget):
    return {target.claim: target.is_met for target in sgm.targets(result, budget)}


def test_targets_at_short():
    gains = {f"{phantom}/{metric}": [0.04] * 4 + [-0.01] for phantom in BOTH for metric in sgm.SHOWN}
    gains["lasting/auc"] = [0.1] * 3 + [-0.01] * 2
    gains["transient/saliency_entropy"] = [-0.01] * 5
    missed = {claim for claim, met in verdicts(made_up(gains), "short").items() if not met}
    assert missed == {
        "short: transient/saliency_entropy, sgm minus random",
        "short: lasting/auc, share of pairs that sgm wins",
    }
    assert len(verdicts(made_up(gains), "short")) == 10


@pytest.mark.parametrize(("gain", "met"), [(-0.004, 1), (-0.002, 2), (0.006, 4), (0.011, 5)])
def test_targets_at_long(gain, met):
    gains = {f"{phantom}/{metric}": [gain] for phantom in BOTH for metric in ("auc", "auc_no_dominant")}
    gains |= {f"{phantom}/saliency_entropy": [0.0 if phantom == "lasting" else -0.1] for phantom in BOTH}
    found = verdicts(made_up(gains), "long")
    assert len(found) == 6
    assert sum(found.values()) == met


def test_the_result_file_says_what_was_missed(tmp_path):
    result = StudyResult("sgm", {}, targets=[Target("a", 0.01, 0.02), Target("b", math.nan, 0.0)])
    result.write(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["targets"] == [
        {"claim": "a", "found": 0.01, "at_least": 0.02, "met": False},
        {"claim": "b", "found": None, "at_least": 0.0, "met": False},
    ]
    assert str(result.targets[0]) == "target MISSED: a is +0.0100, wanted at least +0.02"
