"""Runs a federation and reads its folder; compares variants of one run, pair by pair."""

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from panfm.config import RunConfig, dump_toml, site_folders
from panfm.evaluate.embed import load_model
from panfm.evaluate.probe_cohort import Task, evaluate_cohort
from panfm.evaluate.probe_labels import LabelledStore, read_label_info
from panfm.models import PanModel
from panfm.report.console_tables import number_text
from server.run_folder import RunFolder
from simulations.cohorts.prepare import load_simulation, prepare_cohort
from simulations.engines import Job, run_job
from simulations.harness import StudyOptions, StudyResult, run_jobs

Arms = Mapping[str, Sequence[str]]
"""Arm -> what it changes in the run, as `--set` would; the first is what the others are compared to."""


@dataclass(frozen=True)
class Federated:
    """Results of a federation."""

    model: PanModel
    rounds: Sequence[Mapping[str, Any]]
    """The lines of rounds.jsonl."""


@dataclass(frozen=True)
class ArmJob:
    """One arm, trained once and probed."""

    draw: int
    seed: int
    arm: str
    run: RunConfig
    cohort: Path

    def __str__(self) -> str:
        key = hashlib.sha256(dump_toml(self.run).encode()).hexdigest()[:8]
        return f"phantom {self.draw}, seed {self.seed}, {self.arm} ({self.run.name} {key})"


def federate(run: RunConfig, cohort: Path) -> Federated:
    """A federation over a cohort's sites, by the in-process engine; its progress is not shown."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        folder = RunFolder.create(Path(scratch) / "run", run)
        run_job(Job(cohort / "sites", folder.path), "local")
        return Federated(load_model(folder.path / "model")[0], folder.rounds())


def compare(name: str, experiment: Path, arms: Arms, options: StudyOptions) -> StudyResult:
    """Run every arm on every (draw, seed).

    Metrics:
        auc: of the federated model's frozen features, over all labels and all held-out subjects, as a run probes it.
        bytes_up_round: bytes of updates that all sites together send in a round.
    Ratios:
        `auc/<arm>-minus-<first>` and `auc/<arm>-at-least-<first>`: mean difference, and share of pairs.
    """
    runs = {arm: load_simulation(experiment, changes) for arm, changes in arms.items()}
    described = {arm: run.model_dump(mode="json", by_alias=True) for arm, run in runs.items()}
    result = StudyResult(name, {"pairs": options.pairs(), "arms": described})
    jobs = _jobs(experiment, arms, options.pairs())
    for job, measured in zip(
        jobs, run_jobs(measure, jobs, workers=options.workers, keep_for=options.json), strict=True
    ):
        result.add(job.arm, measured)
    baseline, *others = arms
    for arm in others:
        gain = np.asarray(result.gain("auc", arm, baseline))
        result.ratios[f"auc/{arm}-minus-{baseline}"] = float(gain.mean())
        result.ratios[f"auc/{arm}-at-least-{baseline}"] = float((gain >= 0).mean())
    return result


def _jobs(experiment: Path, arms: Arms, pairs: Sequence[tuple[int, int]]) -> list[ArmJob]:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    of_draw = {draw: f"cohort.seed={draw}" for draw, _ in pairs}
    cohorts = {draw: prepare_cohort(load_simulation(experiment, [change]), console) for draw, change in of_draw.items()}
    return [
        ArmJob(draw, seed, arm, load_simulation(experiment, [*changes, of_draw[draw], f"seed={seed}"]), cohorts[draw])
        for draw, seed in pairs
        for arm, changes in arms.items()
    ]


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm and probe its model."""
    found = federate(job.run, job.cohort)
    places = [LabelledStore.open(folder, job.run.streams) for folder in site_folders(job.cohort / "sites")]
    holdout = LabelledStore.open(job.cohort / "holdout", job.run.streams)
    task = Task(job.run, places, holdout, read_label_info(job.cohort))
    probed = evaluate_cohort(task, {"federated": found.model}, grid_arms=())
    sent = [sum(line["bytes_up"].values()) for line in found.rounds]
    return {"auc": probed.value("federated"), "bytes_up_round": float(np.mean(sent))}


def show(result: StudyResult, arms: Arms, console: Console | None = None) -> None:
    """Mean and sd per arm, and the paired differences of AUC to the first."""
    console = console or Console(soft_wrap=True, highlight=False)
    baseline = next(iter(arms))
    table = Table(
        "arm", "AUC", f"- {baseline}", "pairs won", "kB up a round", title=f"{result.name}: mean ± sd over pairs"
    )
    for arm in arms:
        gain = np.asarray(result.gain("auc", arm, baseline))
        won = "" if arm == baseline else f"{(gain > 0).sum()}/{len(gain)}"
        sent = f"{result.mean('bytes_up_round', arm) / 1e3:.0f}"
        table.add_row(
            arm, mean_sd(result.values["auc", arm]), "" if arm == baseline else f"{gain.mean():+.3f}", won, sent
        )
    console.print(table)


def mean_sd(values: Sequence[float]) -> str:
    """A table cell."""
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{number_text(float(np.mean(values)))} ± {number_text(float(spread))}"
