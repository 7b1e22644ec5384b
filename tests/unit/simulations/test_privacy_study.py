import io
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from rich.console import Console

from panfm.config import dump_toml, load_run, site_folders
from panfm.data.cache import open_store
from panfm.models import build_model
from panfm.models.warm_start import start_model
from panfm.privacy.guarantees import NO_CLAIM, claim
from panfm.privacy.mechanisms import epsilon, planned
from simulations.harness import TRANSIENT, CohortJob, StudyOptions
from simulations.studies import privacy_study as privacy
from simulations.studies._federations import RunJob
from simulations.studies.privacy_study import ARMS, METRICS, REFERENCES, PublicJob, answers, targets
from simulations.study_result import StudyResult

NOISE_OF = privacy.noise_of


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    """The model of `transient` at seed 3, as if it had been trained."""
    folder, run = tmp_path_factory.mktemp("public"), load_run(TRANSIENT, ["seed=3"])
    shared, _ = build_model(run).split_state(run.sharing)
    safetensors.torch.save_file(dict(shared), folder / "model.safetensors")
    (folder / "run.toml").write_text(dump_toml(run))
    return folder


SMALL = {"_MEMBERS": 4, "_ATTACKED": 6, "_ROUNDS": 1, "_LOCAL_STEPS": 1, "_PUBLIC_ROUNDS": 1, "_PUBLIC_STEPS": 1}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Four members and four others a site."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(privacy, "_MEMBERS", SMALL["_MEMBERS"])
        return privacy.write_draw(CohortJob(7, tmp_path_factory.mktemp("cohort") / "7", holdout=16))


@pytest.fixture(autouse=True)
def quick_noise(monkeypatch):
    """The accountant takes seconds to find the noise."""
    monkeypatch.setattr(privacy, "noise_of", lambda target, *_: 12.0 / target)


def result_of(**auc: float) -> StudyResult:
    """Two equal pairs; everything that is not given is 0.5."""
    result = StudyResult("privacy", {})
    for arm in (*ARMS, *REFERENCES):
        for metric in METRICS:
            value = auc.get(arm.replace("-", "_"), 0.5) if metric == "auc" else 0.5
            result.values[metric, arm] = [value, value]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("arm", [pytest.param("cold-8", marks=pytest.mark.long), "warm-2"])
def test_private_arms_spend_their_epsilon(arm, public, monkeypatch):
    monkeypatch.setattr(privacy, "noise_of", NOISE_OF)
    run = privacy.arm_run(arm, 1, public)
    total = [*planned(run)] * run.train.rounds
    assert {each.name for each in total} == {"gradients", "saliency"}
    target = float(arm.partition("-")[2])
    assert target - 0.05 < epsilon(total, run.patient_dp.delta) <= target == run.patient_dp.epsilon
    assert claim(run) == f"({target:g}, 0.001)-DP per patient of one site, add-or-remove-one"


def test_arms_differ_in_noise_clipping_and_start_alone(public):
    runs = {arm: privacy.arm_run(arm, 1, public) for arm in (*ARMS, *REFERENCES)}
    for start, trained in (("cold", "all"), ("warm", "vectors")):
        same = [runs[f"{start}-{each}"] for each in ("inf", "8", "2")]
        assert len({dump_toml(run.model_copy(update={"patient_dp": None})) for run in same}) == 1
        kept = {(run.train.parts.kind, run.patient_dp.sample_rate, run.patient_dp.public_subjects) for run in same}
        assert kept == {(trained, 0.5, 100)}
        assert claim(same[0]) == NO_CLAIM
    assert {arm for arm, run in runs.items() if run.start} == {"public", *(arm for arm in runs if "warm" in arm)}
    assert {arm for arm, run in runs.items() if run.patient_dp is None} == set(REFERENCES)
    parts = runs["cold-8"].train.parts
    assert {run.train.model_copy(update={"parts": parts}) for run in runs.values()} == {runs["cold-8"].train}
    assert {arm for arm, run in runs.items() if run.train.parts != parts} == {"warm-inf", "warm-8", "warm-2"}


def test_references_are_what_the_arms_start_from(public):
    cold, warm = (start_model(privacy.arm_run(arm, 1, public)).state_dict() for arm in ("cold-8", "warm-8"))
    first = build_model(load_run(TRANSIENT, ["seed=3"])).state_dict()
    assert all(torch.equal(warm[name], value) for name, value in first.items())
    assert not all(torch.equal(cold[name], value) for name, value in first.items())


@pytest.mark.slow
def test_half_of_a_site_is_members(cohort):
    run = privacy.arm_run("untrained", 0, cohort)
    for folder in site_folders(cohort / "sites"):
        store = open_store(folder, run.streams)
        numbers = np.array([int(name.rpartition("-")[2]) for name in store.subjects])
        assert set(numbers[store.indices("train")] % 2) == {0}
        assert set(numbers[store.indices("val")] % 2) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["cold-2", pytest.param("warm-inf", marks=pytest.mark.long), "public"])
def test_an_arm_is_trained_probed_and_attacked(cohort, arm, tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(privacy, name, value)
    start = privacy.train_public(PublicJob(7, 0, cohort, tmp_path / "public"))
    before = {path: path.stat().st_size for path in cohort.rglob("*") if path.is_file()}
    measured = privacy.measure(RunJob(7, 0, arm, privacy.arm_run(arm, 0, start), cohort))
    assert tuple(measured) == METRICS
    assert all(0.0 <= measured[metric] <= 1.0 for metric in ("auc", "mia_auc"))
    assert {path: path.stat().st_size for path in cohort.rglob("*") if path.is_file()} == before
    if arm == "warm-inf":
        assert measured["psnr"] == measured["psnr_grey"]
    if arm == "public":  # one draw of the masks in seven hides too much; they are nobody's to repeat
        assert measured["psnr"] > measured["psnr_grey"] + 20.0


@pytest.mark.parametrize(
    ("auc", "met"),
    [
        ({"warm_8": 0.68, "warm_inf": 0.69, "warm_ordinary": 0.71}, [True, False]),
        ({"warm_8": 0.68, "warm_inf": 0.705, "warm_ordinary": 0.69}, [False, True]),
    ],
)
def test_targets_of_auc(auc, met):
    result = result_of(**auc)
    result.ratios = answers(result)
    assert [target.is_met for target in targets(result)] == [True, True, *met]
    assert result.ratios["auc/warm-8-minus-public"] == pytest.approx(auc["warm_8"] - 0.5)


@pytest.mark.parametrize(("start", "met"), [("cold", [False, True]), ("warm", [True, False])])
def test_targets_of_membership(start, met):
    result = result_of()
    result.values["mia_auc", f"{start}-8"] = [0.57, 0.56]
    result.ratios = answers(result)
    assert [target.is_met for target in targets(result)][:2] == met


def test_one_pair_from_start_to_file(monkeypatch, tmp_path, public):
    asked = []

    def jobs(work, given, **_):
        asked.extend(map(str, given))
        return [work(job) for job in given]

    monkeypatch.setattr(privacy, "run_jobs", jobs)
    monkeypatch.setattr(privacy, "write_draw", lambda job: job.folder)
    monkeypatch.setattr(privacy, "train_public", lambda job: public)
    monkeypatch.setattr(privacy, "measure", lambda job: dict.fromkeys(METRICS, 0.5))
    privacy.main(seeds=1, first_seed=100, json=tmp_path / "out.json")
    assert asked[:3] == [
        "draw 100: writing files",
        "draw 1100: writing files",
        "draw 100, seed 100, public model",
    ]
    assert [job.partition(" (")[0] for job in asked[3:]] == [
        f"draw 100, seed 100, {arm}" for arm in (*ARMS, *REFERENCES)
    ]
    table = json.loads((tmp_path / "out.json").read_text())
    assert [each["met"] for each in table["targets"]] == [True] * 4
    assert table["config"]["arms"]["warm-8"]["patient-dp"]["epsilon"] == 8.0


def test_the_table_fits_80_columns():
    console = Console(width=80, soft_wrap=True, file=io.StringIO())
    privacy.show(result_of(), console)
    assert max(map(len, console.file.getvalue().splitlines())) <= 80


def test_pairs_have_public_models_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(privacy, "run_jobs", lambda work, given, **_: [job.folder for job in given])
    cohorts, starts = privacy._prepare(StudyOptions(seeds=2, draws=2, first_seed=5), tmp_path)
    assert cohorts.keys() == {5, 6, 1005, 1006}
    assert len(set(starts.values())) == 4 == len(starts)
