"""Runs a federation and reads its folder; compares variants of one run, pair by pair."""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from panfm.config import RunConfig, dump_toml
from panfm.evaluate.embed import load_model
from panfm.models import PanModel
from server.run_folder import RunFolder
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import load_simulation, prepare_cohort
from simulations.engines import local
from simulations.engines.job import Job
from simulations.harness import StudyOptions, run_jobs
from simulations.studies._tables import mean_sd, print_study
from simulations.study_result import StudyResult

Arms = Mapping[str, Sequence[str]]
"""Arm -> what it changes in the run, as `--set` would; the first is what the others are compared to."""


@dataclass(frozen=True)
class Federated:
    """The outcome of a federation."""

    model: PanModel
    rounds: Sequence[Mapping[str, Any]]
    """The lines of rounds.jsonl."""


@dataclass(frozen=True)
class RunJob:
    """The run of one arm, to be done once and measured."""

    draw: int
    seed: int
    arm: str
    run: RunConfig
    cohort: Path

    def __str__(self) -> str:
        key = hashlib.sha256(dump_toml(self.run).encode()).hexdigest()[:8]
        return f"draw {self.draw}, seed {self.seed}, {self.arm} ({self.run.name} {key})"


@contextlib.contextmanager
def federated(run: RunConfig, cohort: Path, start: Callable[[Job], None] = local.run) -> Iterator[RunFolder]:
    """Run a federation over a cohort's sites, without showing its progress, and yield its run folder.

    Args:
        run: Of the federation.
        cohort: Folder of the cohort.
        start: Runs the federation to its end; the in-process engine when left out.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder.create(Path(scratch) / "run", run)
        with contextlib.redirect_stdout(io.StringIO()):
            start(Job(cohort / "sites", folder.path))
        yield folder


def federate(run: RunConfig, cohort: Path) -> Federated:
    """Run a federation over a cohort's sites by the in-process engine."""
    with federated(run, cohort) as folder:
        return outcome(folder)


def federate_on_copies(run: RunConfig, cohort: Path) -> Federated:
    """Run a federation over copies of the site folders, so that each run has its own privacy ledgers."""
    with tempfile.TemporaryDirectory(dir=cohort.parent) as scratch:
        shutil.copytree(cohort / "sites", Path(scratch) / "sites", copy_function=os.link)
        return federate(run, Path(scratch))


def outcome(folder: RunFolder) -> Federated:
    """Read the outcome of a federation off its run folder."""
    return Federated(load_model(folder.path / "model", whitened=False)[0], folder.rounds())


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
    done = run_jobs(measure, jobs, workers=options.workers, keep_for=options.json)
    for job, measured in zip(jobs, done, strict=True):
        result.add(job.arm, measured)
    baseline, *others = arms
    for arm in others:
        result.add_gain("auc", arm, baseline)
    return result


def _jobs(experiment: Path, arms: Arms, pairs: Sequence[tuple[int, int]]) -> list[RunJob]:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    of_draw = {draw: f"cohort.seed={draw}" for draw, _ in pairs}
    cohorts = {draw: prepare_cohort(load_simulation(experiment, [change]), console) for draw, change in of_draw.items()}
    return [
        RunJob(draw, seed, arm, load_simulation(experiment, [*changes, of_draw[draw], f"seed={seed}"]), cohorts[draw])
        for draw, seed in pairs
        for arm, changes in arms.items()
    ]


def measure(job: RunJob) -> dict[str, float]:
    """Train one arm and probe its model."""
    trained = federate(job.run, job.cohort)
    sent = [sum(line["bytes_up"].values()) for line in trained.rounds]
    auc = OpenedCohort.open(job.cohort, job.run).auc(job.run, trained.model)
    return {"auc": auc, "bytes_up_round": float(np.mean(sent))}


def show(result: StudyResult, arms: Arms, console: Console | None = None) -> None:
    """Print mean and sd per arm, and the paired differences of AUC to the first."""
    baseline, *_ = arms
    title = f"{result.name}: mean ± sd over pairs"
    table = Table("arm", "AUC", f"- {baseline}", "pairs won", "kB up a round", title=title)
    for arm in arms:
        gain = np.asarray(result.gain("auc", arm, baseline))
        to_baseline = ("", "") if arm == baseline else (f"{gain.mean():+.3f}", f"{(gain > 0).sum()}/{len(gain)}")
        sent = f"{result.mean('bytes_up_round', arm) / 1e3:.0f}"
        table.add_row(arm, mean_sd(result.values["auc", arm]), *to_baseline, sent)
    print_study(result, table, console=console, with_ratios=False)
