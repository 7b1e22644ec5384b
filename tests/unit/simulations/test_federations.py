"""Studies that compare federations; their runs are two small phantom hospitals."""

import io
import json

import pytest
from rich.console import Console

from panfm.config import load_run
from panfm.evaluate.result import read_result
from simulations.cohorts.prepare import prepare_cohort
from simulations.harness import TRANSIENT, StudyOptions
from simulations.simulate import simulate
from simulations.studies import coding_study as coding
from simulations.studies import server_optimisers_study as server_optimisers
from simulations.studies._federations import compare, federate, show
from simulations.study_result import StudyResult

RUN = """
name = "small"
[cohort]
kind = "phantom"
holdout-subjects = 16
[cohort.sites]
a = { organs = ["brain"], subjects = 16 }
b = { organs = ["brain", "heart"], subjects = 16 }
[streams]
brain-mr = { spacing-mm = [20.0, 20.0, 20.0], shape = [8, 8, 8], patch = [4, 4, 8] }
heart-mr = { spacing-mm = [16.0, 16.0, 16.0], shape = [8, 8, 8], patch = [4, 4, 8] }
[masking]
static-organs = ["heart"]
[train]
rounds = 2
local-steps = 2
batch-size = 4
"""
ARMS = {"float32": (), "int8": ("sharing.coding=int8",)}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(RUN)
    return tmp_path / "small.toml"


def toy() -> StudyResult:
    result = StudyResult("toy", {})
    for arm, auc, sent in (("float32", 0.66, 4000.0), ("bf16", 0.65, 2000.0), ("int8", 0.67, 1100.0)):
        result.values["auc", arm] = [auc, auc + 0.02, auc]
        result.values["bytes_up_round", arm] = [sent] * 3
    return result


def test_a_federation_comes_back_with_its_rounds(experiment):
    run = load_run(experiment, ARMS["int8"])
    found = federate(run, prepare_cohort(run, Console(file=io.StringIO())))
    assert [line["round"] for line in found.rounds] == [1, 2]
    assert found.model.stream_names == ("brain-mr", "heart-mr")
    numbers = sum(parameter.numel() for parameter in found.model.parameters())
    assert numbers < sum(found.rounds[0]["bytes_up"].values()) < 2.2 * numbers  # heart-mr has one site


@pytest.mark.slow
def test_an_arm_measures_what_a_run_finds(experiment, tmp_path, monkeypatch):
    found = compare("toy", experiment, ARMS, StudyOptions(seeds=1, first_seed=5, workers=1))
    monkeypatch.setattr("simulations.finish.run_jobs", lambda work, jobs: [work(job) for job in jobs])
    words = ["sharing.coding=int8", "seed=5", "cohort.seed=5"]
    folder = simulate(experiment, words, out=tmp_path / "run", console=Console(file=io.StringIO()))
    assert found.values["auc", "int8"] == [read_result(folder / "probe.json").value("federated")]
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert found.values["bytes_up_round", "int8"] == [sum(lines[0]["bytes_up"].values())]
    gain = found.values["auc", "int8"][0] - found.values["auc", "float32"][0]
    assert found.ratios == {"auc/int8-minus-float32": gain, "auc/int8-at-least-float32": float(gain >= 0)}
    assert found.config["arms"]["int8"]["sharing"]["coding"] == "int8"


def test_pairs_differ_in_seed_and_draw(experiment, monkeypatch):
    jobs = []
    monkeypatch.setattr(
        "simulations.studies._federations.prepare_cohort", lambda run, _: f"cohort {run.cohort['seed']}"
    )
    monkeypatch.setattr(
        "simulations.studies._federations.run_jobs", lambda _, found, **__: jobs.extend(found) or [{}] * 8
    )
    with pytest.raises(KeyError):  # nothing was measured
        compare("toy", experiment, ARMS, StudyOptions(seeds=2, draws=2, first_seed=3))
    assert [(job.run.seed, job.cohort, job.arm) for job in jobs] == [
        (seed, f"cohort {draw}", arm) for draw in (3, 4) for seed in (3, 4) for arm in ARMS
    ]
    assert len(set(map(str, jobs))) == 8


@pytest.mark.parametrize("arms", [coding.ARMS, server_optimisers.ARMS], ids=["coding", "server-optimisers"])
def test_arms_are_different_runs(arms):
    runs = [load_run(TRANSIENT, changes) for changes in arms.values()]
    assert runs[0] == load_run(TRANSIENT)
    assert all(run not in runs[:index] for index, run in enumerate(runs))


def test_the_table_fits_80_columns():
    console = Console(width=80, soft_wrap=True, file=io.StringIO())
    show(toy(), coding.ARMS, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if "bf16" in line)
    assert [".657 ± .012" in row, "-0.010" in row, "0/3" in row, " 2 " in row] == [True] * 4


def test_coding_writes_the_bytes_over_those_of_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(coding, "compare", lambda *_: toy())
    coding.main(seeds=3, json=tmp_path / "out.json")
    ratios = json.loads((tmp_path / "out.json").read_text())["ratios"]
    assert ratios == {"float32_bytes": 1.0, "bf16_bytes": 0.5, "int8_bytes": 0.275}
