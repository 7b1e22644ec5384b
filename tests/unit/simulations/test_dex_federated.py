import math

import numpy as np
import pytest
import torch

from panfm.sharing.groups import EXPERTS, ROUTER
from simulations.harness import ArmJob, StudyOptions
from simulations.studies import dex_federated_study as study
from simulations.studies._modalities import Pictures
from simulations.study_result import half_interval

DEX_ARMS = ("private", "pooled", "naive", "local", "centralised")


@pytest.fixture
def one_step(monkeypatch):
    monkeypatch.setattr(study, "_LOCAL_STEPS", 1)
    monkeypatch.setattr("simulations.studies._modalities.JOIN_STEPS", 1)


def trained(cohort, arm):
    run = study.arm_run(0, arm, 1)
    return study.train_arm(ArmJob(3, 0, arm, 1, cohort), run, Pictures.open(cohort, run))


def differing(one, other):
    groups = one.parameter_groups()
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return {groups[name] for (name, value), its in pairs if not torch.equal(value, its)}


@pytest.mark.slow
def test_sites_end_up_with_their_own_experts_only_where_these_are_private(picture_cohort, one_step):
    private, pooled = trained(picture_cohort, "private"), trained(picture_cohort, "pooled")
    assert differing(*list(private.sites.values())[:2]) == {EXPERTS, ROUTER}
    assert differing(*list(pooled.sites.values())[:2]) == set()
    assert private.bytes_round < pooled.bytes_round
    layer = next(iter(private.shared[0].director_experts().values()))
    assert all(torch.equal(layer.experts.weight_in[0], expert) for expert in layer.experts.weight_in)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["private", "local"])
def test_one_arm_measured(picture_cohort, one_step, arm):
    measured = study.measure(ArmJob(3, 0, arm, 1, picture_cohort))
    assert measured.keys() == {*study.METRICS}
    assert math.isnan(measured.pop("bytes_round")) == (arm == "local")
    assert all(0.0 <= value <= 1.0 for value in measured.values())


def test_arms_differ_in_what_they_say():
    runs = {arm: study.arm_run(0, arm, 1) for arm in study.ARMS}
    assert {arm for arm, run in runs.items() if run.model.backbone == "director-experts"} == {*DEX_ARMS}
    assert [runs[arm].sharing.experts for arm in ("private", "pooled", "naive")] == ["private", "pooled", "naive"]
    assert runs["dense"].model.hidden_multiple == 2 * runs["private"].model.hidden_multiple


def test_the_whole_study(monkeypatch, picture_cohort):
    """Private is ahead of dense by .01 and .03, behind naive by .02."""

    def measure(job):
        lead = {"private": 0.02, "dense": 0.01 - 0.02 * job.seed, "naive": 0.04}.get(job.arm, 0.0)
        sent = {"private": 40.0, "pooled": 100.0}.get(job.arm, float("nan"))
        return dict.fromkeys(study.METRICS, 0.5 + lead) | {"bytes_round": sent}

    monkeypatch.setattr(study, "measure", measure)
    monkeypatch.setattr(study, "write_draw", lambda job: picture_cohort)
    result = study.run(StudyOptions(seeds=2, workers=1), rounds=1)
    assert result.ratios["probe_own/private-minus-dense"] == pytest.approx(0.02)
    assert result.ratios["probe_own/private-minus-dense/half-interval"] == pytest.approx(12.706 * 0.01, rel=1e-3)
    assert result.ratios["probe_newsite/private-at-least-dense"] == 1.0
    assert [target.is_met for target in result.targets] == [False, True, False, True, True]


def test_one_pair_has_no_interval():
    assert math.isnan(half_interval(np.array([0.1])))
