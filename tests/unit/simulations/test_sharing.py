import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from panfm.config import load_run
from panfm.data.store import ImageStore
from simulations.harness import TRANSIENT, ArmJob
from simulations.studies import sharing_study as sharing
from simulations.studies.sharing_study import ARMS, show, study_run, targets, train_arm
from simulations.study_result import StudyResult


def test_the_table_fits_80_columns():
    result = StudyResult("sharing", {})
    for arm in ARMS:
        for metric in (*load_run(TRANSIENT).cohort["sites"], "mean", "all-organs"):
            result.values[f"{metric}/auc", arm] = [0.561, 0.585]
    console = Console(width=80, soft_wrap=True, file=io.StringIO())
    show(result, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "university-hospital" in " ".join(lines)
    for line in lines[4:-1]:
        assert line.count(".573 ± .017") == len(ARMS)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_takes_the_same_steps_over_the_same_subjects(monkeypatch, arm):
    trained = []

    def alone(run, store, name, *, start=None):
        assert start is None
        trained.append((name, run.train.rounds * run.train.local_steps, store.subjects))
        return f"model of {name}"

    def together(run, cohort):
        trained.append((run.sharing.rule, run.train.rounds * run.train.local_steps, None))
        return SimpleNamespace(model="model of all")

    monkeypatch.setattr(sharing, "train_alone", alone)
    monkeypatch.setattr("simulations.alone.train_alone", alone)
    monkeypatch.setattr(sharing, "federate", together)
    run = study_run(0, 0, 15)
    stores = {name: ImageStore((name,), ("train",), {}, {}) for name in ("a", "b", "c")}
    models = train_arm(ArmJob(0, 0, arm, 15, Path("cohort")), run, stores)
    assert models.keys() == stores.keys()
    if arm == "local":
        assert trained == [(name, 300, (name,)) for name in stores]
        assert set(models.values()) == {"model of a", "model of b", "model of c"}
    elif arm == "centralised":
        assert trained == [("everyone", 900, ("a", "b", "c"))]
    else:
        assert trained == [(arm, 300, None)]


def test_jobs_of_different_budgets_are_told_apart():
    """What an interrupted study keeps is found again by these words."""
    assert str(ArmJob(0, 0, "local", 15, Path())) != str(ArmJob(0, 0, "local", 50, Path()))


@pytest.mark.parametrize(
    ("at_least_plain", "over_local", "short_of_central", "met"),
    [(0.8, 0.0, 0.01, [True, True, True]), (0.6, -0.001, 0.011, [False, False, False]), (1.0, np.nan, 0.0, [1, 0, 1])],
)
def test_targets(at_least_plain, over_local, short_of_central, met):
    result = StudyResult("sharing", {})
    result.ratios = {
        "mean/auc/grouped-at-least-plain": at_least_plain,
        "mean/auc/grouped-minus-local": over_local,
        "mean/auc/centralised-minus-grouped": short_of_central,
    }
    assert [target.is_met for target in targets(result)] == met
