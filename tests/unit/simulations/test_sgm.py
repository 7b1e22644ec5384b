"""The study of masking policies, at a size that takes seconds."""

import json
import math

import pytest

from simulations.cohorts.phantom_draw import PRESETS, Phantom
from simulations.harness import ArmJob
from simulations.studies import sgm_study as sgm
from simulations.studies._phantoms import render_draw
from simulations.study_result import StudyResult, Target

ORGANS = ("brain", "heart", "adipose", "liver", "kidney", "spleen", "pancreas")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, run = tmp_path_factory.mktemp("draw"), sgm.study_run(0, "random", 1)
    render_draw(
        folder / "transient", Phantom("transient", 100), run.streams, run.organs, train_subjects=80, test_subjects=60
    )
    return folder


def measure(folder, arm):
    return sgm.measure(ArmJob(100, 100, f"transient/{arm}", 2, folder))


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
    gains = {f"{preset}/{metric}": [0.04] * 4 + [-0.01] for preset in PRESETS for metric in sgm.SHOWN}
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
    gains = {f"{preset}/{metric}": [gain] for preset in PRESETS for metric in ("auc", "auc_no_dominant")}
    gains |= {f"{preset}/saliency_entropy": [0.0 if preset == "lasting" else -0.1] for preset in PRESETS}
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
