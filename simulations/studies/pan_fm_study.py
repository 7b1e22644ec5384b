"""Baselines of the Pan-FM paper beside the federation of `make demo`, with organs taken away from the test patients.

Every pair is the demo with a seed of its own for training and for the phantom's draw:

    federated              all sites train one model together
    centralised            the same model on all sites' images in one place
    random-masking         the federation with random masks instead of saliency-guided ones
    local                  each site by itself: mean over the sites' models; `local-best` the best of them
    single-organ           one model per organ, on all sites' images of it: mean over the organs; `single-organ-best`
    late-fusion            their embeddings side by side, means in place of missing ones; `late-fusion-indicator` has
                           zeros instead, and a column for every organ that says whether it is there
    zero-imputation        missing organs are black images in training and in the test, and no mask tells which
    mean-imputation        the same with mean images of the training patients
    supervised             the same network from scratch on the labels
    untrained, statistics  the model before training; plain statistics of the images

Trainings and their budgets are in `_pan_fm_arms.py`, metrics in `_missing_organs.py`. Where an arm has several models,
those that read none of the organs that are left are left out of the mean.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from panfm.config import RunConfig
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import cohort_of, load_simulation, with_cohort
from simulations.harness import QUICKSTART, ArmJob, CohortJob, StudyOptions, run_arms, study
from simulations.studies._cohorts import resized, write_files
from simulations.studies._missing_organs import organ_metrics
from simulations.studies._pan_fm_arms import TRAININGS, Setting
from simulations.studies._tables import mean_sd, print_study
from simulations.study_result import StudyResult, Target

ARMS = (
    "federated", "centralised", "random-masking", "local", "local-best", "single-organ", "single-organ-best",
    "late-fusion", "late-fusion-indicator", "zero-imputation", "mean-imputation", "supervised", "untrained",
    "statistics",
)  # fmt: skip
BASELINES = ("single-organ", "zero-imputation", "mean-imputation", "late-fusion", "late-fusion-indicator", "local")
"""What the federated model has to be ahead of, in the mean over the pairs, with organs missing."""
POOLINGS = ("per-stream", "per-stream-layers", "cls", "cls+mean")
DRAWS = 5
"""Random sets of missing organs, of each size."""
SHOWN = ("auc", "auc_missing", "auc_missing_1", "auc_missing_3", "auc_missing_6", "category", "disease")


Pooling = Annotated[str, typer.Option(help=f"How all models are read: {', '.join(POOLINGS)}.")]


@study(seeds=3, draws=None)
def main(options: StudyOptions, pooling: Pooling = POOLINGS[0]) -> StudyResult:
    """Federated model against single-organ, imputed, late-fused, local, central and supervised ones, organs missing."""
    if pooling not in POOLINGS:
        raise typer.BadParameter(f"{pooling}: expected one of {', '.join(POOLINGS)}", param_hint="--pooling")
    result = run(options, pooling)
    show(result)
    return result


def run(options: StudyOptions, pooling: str = POOLINGS[0]) -> StudyResult:
    """Run the study."""
    described = study_run(0, 0, [f"features.pooling={pooling}"])
    config = {"pairs": options.pairs(), "run": described.model_dump(mode="json", by_alias=True, exclude_none=True)}
    result = StudyResult("pan-fm", config)
    jobs = [f"{pooling}/{training}" for training in TRAININGS]
    for _, measured in run_arms(options, jobs, described.train.rounds, write_draw, measure):
        for arm, values in by_arm(measured).items():
            result.add(arm, values)
    for metric in ("auc", "auc_missing"):
        for arm in ARMS[1:]:
            result.add_gain(metric, "federated", arm)
    result.targets += targets(result)
    return result


def targets(result: StudyResult) -> list[Target]:
    """Targets of the federated model with organs missing."""
    return [
        Target(
            f"AUC with organs missing, federated minus {arm}", result.ratios[f"auc_missing/federated-minus-{arm}"], 0
        )
        for arm in BASELINES
    ]


def study_run(draw: int, seed: int, changes: Sequence[str] = ()) -> RunConfig:
    """The run of the demo, with the seeds of a pair."""
    return load_simulation(QUICKSTART, [f"cohort.seed={draw}", f"seed={seed}", *changes])


def write_draw(job: CohortJob) -> Path:
    """Write one draw of the demo's cohort; returns its folder."""
    described = study_run(job.draw, 0)
    cohort = cohort_of(described)
    if job.subjects is not None and job.holdout is not None:
        cohort = resized(cohort, job.draw, subjects=job.subjects, holdout=job.holdout)
    return write_files(cohort, job.folder, with_cohort(described, cohort))


def measure(job: ArmJob) -> dict[str, float]:
    """Do one training, named `<pooling>/<training>`, and measure its arms; returns `<arm>/<metric>` -> value."""
    pooling, _, training = job.arm.partition("/")
    described = study_run(job.draw, job.seed, [f"train.rounds={job.length}", f"features.pooling={pooling}"])
    setting = Setting(described, job.cohort, OpenedCohort.open(job.cohort, described))
    measured: dict[str, float] = {}
    for arm, auc_of in TRAININGS[training](setting).items():
        metrics = organ_metrics(
            auc_of, tuple(described.streams), setting.cohort.labels, draws=DRAWS, seed=described.seed
        )
        measured |= {f"{arm}/{metric}": value for metric, value in metrics.items()}
    return measured


def by_arm(measured: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Values of `measure` by arm and metric."""
    arms: dict[str, dict[str, float]] = {}
    for name, value in measured.items():
        arm, _, metric = name.partition("/")
        arms.setdefault(arm, {})[metric] = value
    return arms


def show(result: StudyResult, console: Console | None = None) -> None:
    """Print mean and sd of every arm, its difference from the federated model, and the targets."""
    table = Table("arm", *SHOWN, "federated -\nauc_missing", title="pan-fm: mean ± sd over seeds and draws")
    for arm in ARMS:
        gain = np.mean(result.gain("auc_missing", "federated", arm))
        table.add_row(arm, *(mean_sd(result.values[metric, arm], "\n±") for metric in SHOWN), f"{gain:+.3f}")
    print_study(result, table, console=console, with_ratios=False)
