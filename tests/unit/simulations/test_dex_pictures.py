"""The study of Director-Experts from a public start: its arms begin as the public model, and what it answers."""

import pytest
import torch

from panfm.models.transfer import director_state
from panfm.models.warm_start import start_model
from simulations.cohorts.opened import OpenedCohort
from simulations.harness import ArmJob, CohortJob, StudyOptions
from simulations.studies import _class_probe
from simulations.studies import _start_arms as public
from simulations.studies import dex_pictures_study as study
from tests.unit.simulations.test_real_pictures import needs_pictures
from tests.unit.simulations.test_start_arms import change_start_runs


@pytest.fixture
def small_weights(nano_weights, monkeypatch):
    """A nano model, of which the second block has experts."""
    nano = 'model={ size = "nano", tokenizer = "patch", positions = "learned", layer-scale = true }'
    parts = 'train.parts={ kind = "last-blocks", blocks = 1 }'
    change_start_runs(monkeypatch, nano, parts, 'features.pooling="cls+mean"', "features.layers=[]")
    backbone, *_ = study.EXPERTS
    experts = (backbone, "model.experts.count=[1, 4]", "model.experts.active=[1, 2]")
    monkeypatch.setattr(study, "EXPERTS", experts)
    monkeypatch.setattr(study, "_LOCAL_STEPS", 2)
    monkeypatch.setattr(_class_probe, "LABEL_DRAWS", dict.fromkeys((5, 20, 100), 1))


def test_experts_begin_as_the_public_mlps(small_weights):
    run = study.arm_run(0, "private", 3)
    model, dense = start_model(run), start_model(study.arm_run(0, "dense", 3)).state_dict()
    for name, value in director_state(model).items():
        if not name.startswith("heads."):
            assert torch.equal(value, dense[name]), name
    layers = list(model.director_experts().values())
    assert [len(layer.router.activation) for layer in layers] == [1, 4]
    for layer in layers:
        for stacked, director in zip(layer.experts.stacked, layer.director.parameters(), strict=True):
            assert all(torch.equal(expert, director.view_as(expert)) for expert in stacked)


def test_the_momentum_of_directors_is_tied_to_the_length(small_weights, monkeypatch):
    monkeypatch.setattr(study, "_LOCAL_STEPS", 10)
    assert study.arm_run(0, "private", 3).model.experts.director_momentum == pytest.approx((2 / 3, 29 / 30))
    assert study.arm_run(0, "pooled", 3).sharing.experts == "pooled"


@needs_pictures
@pytest.mark.slow
def test_the_arms_end_to_end(small_weights, tmp_path):
    cohort = study.write_draw(CohortJob(0, tmp_path / "cohort"))
    measured = {arm: study.measure(ArmJob(0, 3, arm, 1, cohort)) for arm in ("start", "private", "local")}
    own, held_out, director = (
        {f"{family}_{percent}" for percent in (5, 20, 100)} for family in ("own", "heldout", "own_director")
    )
    assert measured["start"].keys() == own | held_out | {"bytes_round"}
    for arm in ("private", "local"):
        assert measured[arm].keys() == measured["start"].keys() | director
        assert any(measured[arm][name] != measured["start"][name] for name in own)
    opened = OpenedCohort.open(public.folder_without(cohort, public.HELD_OUT), study.arm_run(3, "dense", 1))
    assert all(public.HELD_OUT not in store.images for store in opened.stores.values())


def test_answers(monkeypatch):
    """Experts gain .02 on a site's own modality over dense, the director loses .01 on the held-out one."""

    def run_arms(options, arms, length, write_draw, measure):
        for draw, seed in options.pairs():
            for arm in arms:
                own = {f"own_{percent}": 0.8 + 0.02 * (arm == "private") for percent in (5, 20, 100)}
                held_out = {f"heldout_{percent}": 0.7 - 0.01 * (arm == "private") for percent in (5, 20, 100)}
                yield ArmJob(draw, seed, arm, length, None), own | held_out

    monkeypatch.setattr(study, "run_arms", run_arms)
    monkeypatch.setattr(study, "arm_run", lambda seed, arm, rounds: public.load_simulation(public.EXPERIMENT))
    result = study.run(StudyOptions(seeds=2), 1, ["start", "dense", "private"])
    assert result.ratios["own/private-minus-dense"] == pytest.approx(0.02)
    assert result.ratios["heldout/private-minus-start"] == pytest.approx(-0.01)
    assert "own/dense-minus-start" in result.ratios
    [target] = result.targets
    assert not target.is_met
