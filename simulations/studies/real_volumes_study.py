"""Volumes of the hippocampus from frozen features: 3D views, finer tokens, tokens in place, slices for a public start.

Every seed shares out the people of `configs/experiments/real-volumes.toml` anew: two clinics train, a quarter is held
out. Features of the clinics' volumes are fitted to the volumes of the anterior and posterior hippocampus in mm3 by
ridge regression, penalty by leave-one-out, and tested on the held-out people. Both sides of a person stay together.

    statistics       plain statistics of each scan, at 1 mm, and of its blocks of 8 mm
    untrained        the model before its first step
    views            the federated model
    untrained-coarse, views-coarse   the same with tokens of 10 x 14 x 10 mm
    start-slices     a frozen public ViT-S/14 that $PANFM_WEIGHTS names, on 12 coronal slices of 112 x 112 pixels, each
                     by itself
    start-mean, start-centre, start-joint    the same model on volumes, with tokens of 8 mm: its kernel spread over a
                     patch's depth, in the patch's middle slice, or on coronal slices in one sequence (`slices`)

Models are read in two ways (`_volume_readings.py`): pooled, as the run or blocks 8, 10 and 12 say, and, as
`<arm>-in-place`, by their tokens in their places.
`r2_anterior`, `r2_posterior`, `r2_mean` are R2 on the held-out volumes; `r2_mean_low` and `r2_mean_high` its 95 %
interval, over resamples of volumes (somewhat too narrow, since two volumes are one person's).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from panfm.config import RunConfig, load_run
from panfm.data.store import ImageStore
from panfm.evaluate.linear_probe import fit_regressors, r2_per_label
from panfm.evaluate.scores import draw_counts, interval
from panfm.evaluate.statistics import measure_store
from panfm.models import build_model
from panfm.models.warm_start import start_model
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import cohort_of, load_simulation, public_weights
from simulations.cohorts.real_images import CLINICS, HIPPOCAMPUS, LABELS
from simulations.harness import QUICKSTART, ArmJob, CohortJob, StudyOptions, chosen_arms, run_arms, study
from simulations.studies import _start_arms as public
from simulations.studies._cohorts import write_files
from simulations.studies._federations import federate
from simulations.studies._tables import mean_sd, print_study
from simulations.studies._volume_readings import SIDE, Reading, in_place, read_slices, read_volumes
from simulations.study_result import StudyResult, Target

EXPERIMENT = QUICKSTART.with_name("real-volumes.toml")
ROUNDS = {"short": 5, "long": 20}
INFLATED = {
    "start-mean": ("mean", "[0.571, 1.0, 0.571], shape = [70, 56, 70], patch = [14, 8, 14]"),
    "start-centre": ("centre", "[0.571, 1.0, 0.571], shape = [70, 56, 70], patch = [14, 8, 14]"),
    "start-joint": (None, "[0.571, 8.0, 0.571], shape = [70, 7, 70], patch = [14, 1, 14], slices = 'A'"),
}
"""Arm -> `start.inflate`, and the volumes' stream from its spacing on."""
ARMS: tuple[str, ...] = ("statistics", "untrained", "views", "untrained-coarse", "views-coarse", "start-slices")
ARMS += tuple(INFLATED)
WITHOUT_WEIGHTS = ARMS[:5]
ROWS = tuple(row for arm in ARMS for row in ([arm] if arm == "statistics" else [arm, f"{arm}-in-place"]))
COARSE = (f"streams.{HIPPOCAMPUS}.patch=[5, 7, 5]",)
FINE_VOXELS = (f"streams.{HIPPOCAMPUS}={{ spacing-mm = [1.0, 1.0, 1.0], shape = [40, 56, 40], patch = [8, 8, 8] }}",)
SLICES = (
    f"streams={{ {HIPPOCAMPUS} = {{ shape = [{SIDE}, {SIDE}], patch = [14, 14] }} }}",
    'model={ size = "small", tokenizer = "patch", positions = "learned", layer-scale = true }',
    'features={ pooling = "layers", layers = [8, 10, 12] }',
    'train.parts={ kind = "norms" }',
)
"""Changes of the run, as `--set` would make them."""
CHOSEN, UNTRAINED = "views-in-place", "untrained-in-place"
"""The row of the targets, and the untrained model read alike; chosen on seeds 100 to 103 (views on 100 alone)."""
RESAMPLES = 1000
COMPARED = (("views", "untrained"), ("views-in-place", "untrained-in-place"), ("views-in-place", "statistics"))
METRICS = ("r2_anterior", "r2_posterior", "r2_mean", "r2_mean_low", "r2_mean_high")

Features = tuple[NDArray[np.floating], NDArray[np.floating]]
"""Of the volumes that a probe is fitted on, and of those that it is tested on."""
Arms = Annotated[str, typer.Option(help="Only these arms, with commas between.")]

_ALL = ",".join(ARMS)


@study(seeds=3, draws=None, budgets=ROUNDS, unit="rounds of 20 steps")
def main(options: StudyOptions, budget: str, arms: Arms = _ALL) -> StudyResult:
    """R2 of two volumes of the hippocampus, from frozen features of 3D models and of a public 2D model."""
    result = run(
        options, ROUNDS[budget], public.possible_arms(chosen_arms(arms, ARMS), without_weights=WITHOUT_WEIGHTS)
    )
    show(result)
    return result


def run(options: StudyOptions, rounds: int, arms: Sequence[str]) -> StudyResult:
    """Run the study with some of the arms."""
    runs = {arm: start_run(arm) if arm.startswith("start-") else arm_run(arm, 0, rounds) for arm in arms}
    described = {arm: run.model_dump(mode="json", by_alias=True, exclude_none=True) for arm, run in runs.items()}
    result = StudyResult("real-volumes", {"pairs": options.pairs(), "rounds": rounds, "runs": described})
    for job, measured in run_arms(options, arms, rounds, partial(write_draw, arms=tuple(arms)), measure):
        for name, value in measured.items():
            suffix, _, metric = name.rpartition(":")
            result.add(job.arm + suffix, {metric: value})
    add_answers(result)
    return result


def arm_run(arm: str, seed: int, rounds: int) -> RunConfig:
    """The run of one arm; the cohort is drawn by the same seed."""
    changes = [f"seed={seed}", f"cohort.seed={seed}", f"train.rounds={rounds}"]
    if arm.endswith("-coarse"):
        changes += COARSE
    if arm in ("statistics", "start-slices"):
        changes += FINE_VOXELS
    if arm in INFLATED:
        changes += [f"streams.{HIPPOCAMPUS}={{ spacing-mm = {INFLATED[arm][1]} }}"]
    return load_simulation(EXPERIMENT, changes)


def start_run(arm: str) -> RunConfig:
    """The run of an arm whose start is the public model, on pictures of slices or on volumes."""
    changes = [*SLICES, f"start.model={public_weights()}"]
    if arm in INFLATED:
        inflate, images = INFLATED[arm]
        changes += [f"streams={{ {HIPPOCAMPUS} = {{ spacing-mm = {images} }} }}"]
        changes += [f"start.inflate={inflate}", "start.inflate-axis=A"] if inflate else []
    return load_run(EXPERIMENT, changes)


def write_draw(job: CohortJob, arms: Sequence[str] = ARMS) -> Path:
    """Write the folders of the sites and of the held-out people, and their volumes as some arms read them."""
    run = arm_run("views", job.draw, 1)
    write_files(cohort_of(run), job.folder, run)
    for arm in (arm for arm in ("views-coarse", "start-slices", *INFLATED) if arm in arms):
        OpenedCohort.open(job.folder, arm_run(arm, job.draw, 1))
    return job.folder


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm and probe its features; metrics of the second reading begin with it (`-in-place:`)."""
    run = arm_run(job.arm, job.seed, job.length)
    cohort = OpenedCohort.open(job.cohort, run)
    if job.arm == "statistics":
        return probe(cohort, read_statistics(cohort, run), job.seed)
    fit, test = read_arm(job.arm, run, cohort, job.cohort)
    measured = probe(cohort, (fit.pooled, test.pooled), job.seed)
    placed = probe(cohort, in_place(fit, test), job.seed)
    return measured | {f"-in-place:{metric}": value for metric, value in placed.items()}


def stores(cohort: OpenedCohort) -> list[ImageStore]:
    """Volumes of the clinics, and those that are held out."""
    return [*(cohort.sites[clinic].store for clinic in CLINICS), cohort.holdout.store]


def read_statistics(cohort: OpenedCohort, run: RunConfig) -> Features:
    """Plain statistics of the volumes."""
    *fit, test = (measure_store(store, run.streams)[HIPPOCAMPUS].values for store in stores(cohort))
    return np.concatenate(fit), test


def read_arm(arm: str, run: RunConfig, cohort: OpenedCohort, folder: Path) -> tuple[Reading, Reading]:
    """Readings of the clinics' volumes and of the held-out ones by the model of an arm, which may be trained first."""
    if arm == "start-slices":
        model = start_model(start_run(arm))
        readings = [read_slices(model, store, HIPPOCAMPUS) for store in stores(cohort)]
    elif arm in INFLATED:
        model = start_model(start_run(arm))
        readings = [read_volumes(model, store, HIPPOCAMPUS) for store in stores(cohort)]
    else:
        model = federate(run, folder).model if arm.startswith("views") else build_model(run)
        readings = [read_volumes(model, store, HIPPOCAMPUS) for store in stores(cohort)]
    return joined(readings[:-1]), readings[-1]


def probe(cohort: OpenedCohort, features: Features, seed: int) -> dict[str, float]:
    """R2 on the held-out volumes of ridge regressions that are fitted on the clinics' volumes."""
    *fit, truth = (
        place.values(list(LABELS), np.arange(len(place.store.subjects)))
        for place in (*(cohort.sites[clinic] for clinic in CLINICS), cohort.holdout)
    )
    scores = fit_regressors(features[0], np.concatenate(fit), list(LABELS)).score(features[1])
    values = r2_per_label(scores, truth, draw_counts(len(truth), RESAMPLES, seed))
    mean = interval(values)
    named = {f"r2_{name.removesuffix('-volume')}": float(value) for name, value in zip(LABELS, values[0], strict=True)}
    return named | {"r2_mean": mean.value, "r2_mean_low": mean.low, "r2_mean_high": mean.high}


def add_answers(result: StudyResult) -> None:
    """Add gains of the mean R2, and the targets of the arms that were measured."""
    measured = measured_rows(result)
    for arm, baseline in COMPARED:
        if {arm, baseline} <= {*measured}:
            result.add_gain("r2_mean", arm, baseline, with_interval=True)
    if {CHOSEN, UNTRAINED, "statistics"} <= {*measured}:
        apart = result.mean("r2_mean_low", CHOSEN) - result.mean("r2_mean_high", UNTRAINED)
        gain = result.mean("r2_mean", CHOSEN) - result.mean("r2_mean", "statistics")
        result.targets += [
            Target(f"mean R2, lower end of {CHOSEN} minus upper end of {UNTRAINED}", apart, 0.0),
            Target(f"mean R2, {CHOSEN} minus statistics", gain, 0.0),
        ]


def measured_rows(result: StudyResult) -> list[str]:
    """Arms and readings that were measured, in the order of the table."""
    return [row for row in ROWS if row in {arm for _, arm in result.values}]


def joined(readings: Sequence[Reading]) -> Reading:
    """Readings of several places as one."""
    pooled, tokens = zip(*((reading.pooled, reading.tokens) for reading in readings), strict=True)
    return Reading(np.concatenate(pooled), np.concatenate(tokens))


def show(result: StudyResult, console: Console | None = None) -> None:
    """Print mean and standard deviation of every metric and arm, the gains, and the targets."""
    table = Table("", *METRICS, title="real-volumes: mean ± sd over seeds")
    for row in measured_rows(result):
        table.add_row(row, *(mean_sd(result.values[metric, row]) for metric in METRICS))
    print_study(result, table, console=console)
