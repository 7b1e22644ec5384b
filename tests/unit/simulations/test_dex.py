import io
import math

import numpy as np
import pytest
import torch
import typer
from rich.console import Console

from panfm.models import build_model
from panfm.models.backbone import Routed
from simulations.harness import ArmJob, CohortJob, StudyOptions, chosen_arms
from simulations.studies import dex_study as dex
from simulations.studies._modalities import Pictures, print_result, probe_joined, study_run, with_backbone
from simulations.study_result import StudyResult

PROBES = {"probe_own", "probe_pooled", "probe_heldout", "probe_lomo", "cka"}


def test_every_arm_costs_the_same():
    widths = {arm: dex.arm_run(0, arm, 1).model for arm in dex.ARMS}
    dense = widths["dense"].hidden_multiple
    for arm in ("token-moe", "random-routing", "dex"):
        assert widths[arm].hidden_multiple * widths[arm].experts.active[0] == dense
        assert widths[arm].experts.count == (8,)
    assert widths["dex"].experts.alignment_weight > 0
    assert widths["token-moe"].experts.alignment_weight == widths["random-routing"].experts.alignment_weight == 0


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["dex", "token-moe", pytest.param("dex-released", marks=pytest.mark.long)])
def test_one_arm_measured(picture_cohort, arm):
    measured = dex.measure(ArmJob(3, 0, arm, 1, picture_cohort))
    blocks = {f"block-{block}/{metric}" for block in range(2) for metric in ("nmi", "conflict")}
    expected = {*PROBES, *blocks, "nmi", "nmi_unit", "experts_used", "conflict", "conflict_share", "val_loss"}
    assert measured.keys() == expected | ({f"director:{name}" for name in PROBES} if arm != "token-moe" else set())
    assert all(math.isfinite(value) for value in measured.values())
    assert measured["nmi"] == measured["block-1/nmi"]
    assert (measured["nmi"] == measured["nmi_unit"]) == (arm != "token-moe")


@pytest.mark.slow
def test_a_dense_model_has_no_specialisation(picture_cohort):
    run = dex.arm_run(0, "dense", 1)
    assert dex.specialisation(build_model(run), Pictures.open(picture_cohort, run)) == {}


@pytest.mark.parametrize("arm", ["dense", "dex"])
def test_conflict_is_read_off_the_mlp_or_the_experts_alone(arm):
    model = build_model(dex.arm_run(0, arm, 1))
    part = ".mlp.experts." if arm == "dex" else ".mlp."
    for index, layer in enumerate(dex._layers(model)):
        named = [value for name, value in model.backbone.named_parameters() if name.startswith(f"blocks.{index}{part}")]
        assert len(named) == 4
        assert all(one is other for one, other in zip(layer, named, strict=True))


def test_gates_of_pictures_and_of_tokens():
    gates = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [0.6, 0.4]])
    chosen = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1]])
    routed = Routed(torch.zeros(4, 3), chosen, gates, torch.zeros(0), torch.zeros(0))
    expected = [[0.25, 0.0, 0.75], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 0.4, 0.6]]
    np.testing.assert_allclose(dex._gates(routed, 4)[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(dex._gates(routed, 2), np.reshape(expected, (2, 2, 3)), atol=1e-6)


def test_a_modality_joins_a_frozen_backbone_by_its_tokenizer_alone(picture_cohort, monkeypatch):
    """And by all that it has where nothing is frozen."""
    run = with_backbone(study_run(0, steps=1), "dense")
    pictures = Pictures.open(picture_cohort, run)
    state, moved = build_model(run).state_dict(), []

    def see(_pictures, model, *_):
        moved.append({name for name, value in model.state_dict().items() if not torch.equal(value, state[name])})
        return [0.5]

    monkeypatch.setattr("simulations.studies._modalities.probe_own", see)
    monkeypatch.setattr("simulations.studies._modalities.JOIN_STEPS", 1)
    assert probe_joined(pictures, run, state, frozen=True) == 0.5
    probe_joined(pictures, run, state, frozen=False)
    assert all("streams.skin-photo." in name for name in moved[0])
    assert "streams.skin-photo.project.weight" in moved[0]
    assert "backbone.blocks.0.mlp.0.weight" in moved[1]


def test_streams_are_at_one_site_or_held_out(picture_cohort):
    run = study_run(0, steps=1)
    pictures = Pictures.open(picture_cohort, run)
    assert pictures.held_out == ("skin-photo",)
    assert sorted((*pictures.trained, *pictures.held_out)) == sorted(run.streams)
    joined = pictures.together
    assert len(joined.store.subjects) == sum(len(place.store.subjects) for place in pictures.sites.values())
    assert set(joined.values(list(pictures.labels), np.arange(len(joined.store.subjects))).sum(axis=1)) == {1.0}


def test_the_whole_study(tmp_path, monkeypatch, picture_cohort):
    def measure(job):
        base = {"dense": 0.5, "dex": 0.6}.get(job.arm, 0.4) + 0.01 * job.seed
        measured = dict.fromkeys((*PROBES, "nmi", "nmi_unit", "conflict", "val_loss"), base)
        return measured | ({f"director:{name}": 0.45 for name in PROBES} if job.arm == "dex" else {})

    monkeypatch.setattr(dex, "measure", measure)
    monkeypatch.setattr(dex, "write_draw", lambda job: picture_cohort)
    result = dex.run(StudyOptions(seeds=2, workers=1), steps=1)
    assert result.values["probe_pooled", "dex-director"] == [0.45, 0.45]
    assert result.ratios["nmi_dex-minus-token-moe"] == pytest.approx(0.2)
    assert result.ratios["conflict_dex_over_dense"] == pytest.approx(0.605 / 0.505)
    assert result.ratios["probe_pooled/dex-at-least-dense"] == 1.0
    assert result.ratios["probe_pooled/dex-director-at-least-dense"] == 0.0
    assert [target.is_met for target in result.targets] == [True, True, False, True]
    result.write(tmp_path / "dex.json")


@pytest.mark.parametrize("arms", [dex.ARMS, ("dex", *dex.RELEASED)])
def test_the_table_fits_80_columns(arms):
    result, rows = StudyResult("dex", {}), dex.rows_of(arms)
    for arm in rows:
        for metric in dex.SHOWN:
            result.values[metric, arm] = [0.561, 0.585]
    console = Console(width=80, soft_wrap=True, file=io.StringIO())
    print_result(result, rows, dex.SHOWN, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("±.017") for line in lines) == len(rows) * len(dex.SHOWN)


def test_some_arms_alone_are_compared_to_dex(monkeypatch, picture_cohort):
    """A deviation that gains .01 and .03: .02 +- 12.706 x .01."""

    def measure(job):
        base = 0.5 if job.arm == "dex" else 0.51 + 0.02 * job.seed
        return dict.fromkeys((*PROBES, "nmi", "conflict", "val_loss"), base) | {"director:probe_own": base - 0.1}

    monkeypatch.setattr(dex, "measure", measure)
    monkeypatch.setattr(dex, "write_draw", lambda job: picture_cohort)
    result = dex.run(StudyOptions(seeds=2, workers=1), steps=1, arms=("dex", "dex-released"))
    assert not result.targets
    assert result.ratios["nmi/dex-released-minus-dex"] == pytest.approx(0.02)
    assert result.ratios["nmi/dex-released-minus-dex/half-interval"] == pytest.approx(12.706 * 0.01, rel=1e-3)
    assert result.ratios["probe_own/dex-released-director-minus-dex-director"] == pytest.approx(0.02)


def test_arms_come_in_the_studys_order_once_each():
    assert chosen_arms("dex-released,dex,dex", (*dex.ARMS, *dex.RELEASED)) == ["dex", "dex-released"]
    assert chosen_arms(",".join(dex.ARMS), (*dex.ARMS, *dex.RELEASED)) == [*dex.ARMS]
    assert dex.rows_of(["dex", "dex-released"]) == ["dex", "dex-director", "dex-released"]


def test_an_unknown_arm_is_refused():
    with pytest.raises(typer.BadParameter, match="dex-relased: expected some of dense, "):
        dex.main(arms="dex,dex-relased")


def test_jobs_are_told_apart():
    jobs = [ArmJob(0, seed, arm, 1, "") for seed in (0, 1) for arm in (*dex.ARMS, *dex.RELEASED)]
    assert len({str(job) for job in [*jobs, CohortJob(0, ""), CohortJob(1, "")]}) == len(jobs) + 2
