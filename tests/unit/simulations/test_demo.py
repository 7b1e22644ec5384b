import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from panfm.evaluate.result import ProbeResult
from simulations.cohorts.prepare import load_simulation
from simulations.harness import QUICKSTART, StudyOptions
from simulations.studies import demo_study as demo
from simulations.studies.demo_study import DemoJob, by_arm, demo_run, scores, show, targets
from simulations.study_result import StudyResult

METRICS = ("auc", "auc_100", *(f"auc_missing_{number}" for number in range(1, 7)))
SITES = ("site:heart-centre", "site:neuro-centre")
ARMS = ("federated", *SITES, "untrained", "statistics", "tokenizer")


def measured(**auc):
    """Measurements of one job, for every arm and metric: .6, or the `auc` that is given."""
    known = {name.replace("_", "-"): value for name, value in auc.items()}
    return {f"{arm}/{metric}": known.get(arm.removeprefix("site:"), 0.6) for arm in ARMS for metric in METRICS}


def test_a_seed_trains_on_its_own_draw():
    assert StudyOptions(3, None, 100).pairs() == [(100, 100), (101, 101), (102, 102)]
    assert StudyOptions(3, None, 100).draw_numbers() == [100, 101, 102]
    run = demo_run(DemoJob(7, 8))
    assert (run.cohort["seed"], run.seed) == (7, 8)
    assert run.model_copy(update={"seed": 0, "cohort": run.cohort | {"seed": 0}}) == load_simulation(QUICKSTART)


def test_scores_of_a_probe_are_by_arm_and_metric():
    grid = {"auc": 0.7, "auc_missing_1": 0.65, "auc_drop_heart": 0.1, "auc_no_dominant": 0.5}
    probe = ProbeResult((), {"federated": grid}, {}, {}, few_labels={"federated": {"auc_100": 0.6}})
    assert scores(probe) == {"federated": {"auc": 0.7, "auc_missing_1": 0.65, "auc_100": 0.6}}


def test_a_job_is_the_demo_with_its_seeds(monkeypatch):
    """Cohort, federation and probes are those of the job's run; organs are taken away in every arm."""
    seen = []

    @contextlib.contextmanager
    def federated(run, cohort):
        seen.append((run.seed, run.cohort["seed"], cohort))
        yield SimpleNamespace(path="run folder")

    def probe_run(run, cohort, folder, console, *, with_all_grids):
        assert (cohort, folder, with_all_grids) == ("cohort 4", "run folder", True)
        return ProbeResult((), {"federated": {"auc": 0.7}}, {}, {}, few_labels={"federated": {"auc_100": 0.6}})

    monkeypatch.setattr(demo, "prepare_cohort", lambda run, console: f"cohort {run.cohort['seed']}")
    monkeypatch.setattr(demo, "federated", federated)
    monkeypatch.setattr(demo, "probe_run", probe_run)
    assert demo.measure(DemoJob(4, 5)) == {"federated/auc": 0.7, "federated/auc_100": 0.6}
    assert seen == [(5, 4, "cohort 4")]


def test_the_best_site_is_the_best_in_each_metric():
    values = measured(heart_centre=0.7) | {
        "site:neuro-centre/auc_100": 0.8,
        "site:heart-centre/auc_missing_1": np.nan,
    }
    best = by_arm(values)["best-site"]
    assert set(best) == set(METRICS)
    assert (best["auc"], best["auc_100"], best["auc_missing_1"]) == (0.7, 0.8, 0.6)


@pytest.mark.parametrize(
    ("second", "met"), [({"federated": 0.7}, [True] * 4), ({"federated": 0.64}, [False, False, True, False])]
)
def test_targets_must_hold_in_every_pair(monkeypatch, second, met):
    monkeypatch.setattr(
        demo, "run_jobs", lambda *_, **__: [measured(federated=0.7), measured(heart_centre=0.65, **second)]
    )
    result = demo.run(StudyOptions(2, None))
    assert [target.is_met for target in targets(result)] == met
    assert {arm for _, arm in result.values} == {*ARMS, "best-site"}
    assert {metric for metric, _ in result.values} == set(METRICS)
    assert {len(values) for values in result.values.values()} == {2}
    assert result.config["pairs"] == [(0, 0), (1, 1)]


def test_the_table_fits_80_columns():
    result = StudyResult("demo", {"pairs": [(0, 0), (1, 1)]})
    for _ in range(2):
        for arm, values in by_arm(measured()).items():
            result.add(arm, values)
    console = Console(width=80, soft_wrap=True, file=io.StringIO())
    show(result, console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert text.count(".600 ± .000") == 4 * (len(ARMS) + 1)
