"""Features of real pictures at few labels: what pre-training by views adds to an untrained model and to statistics.

Five sites with the pictures of six modalities (`configs/experiments/real-pictures.toml`):

    statistics   plain statistics of each picture and of its blocks
    untrained    the model before its first step
    views        the federated model
    views-alone  each site's own model, after as many local steps on its own pictures

With a public start, where $PANFM_WEIGHTS names its weights (`_start_arms.py`): `start`, `start-readout`, `adapted`,
`adapted-readout`.

Models from scratch are read in the same way (`pooled`), and all features by the same probe: ridge regressions of the
classes within a modality, penalty by leave-one-out. They are fitted on 5, 20 and 100 per cent of the labelled training
pictures, at least two of a class, drawn alike for all arms, and tested on the data's own test split. Modalities of one
class have no metric. `auc_<stream>_<percent>` is the mean AUC of the classes, over several draws of the labels,
`auc_mean_<percent>` the mean over the streams.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from panfm.anatomy import parse_stream
from panfm.config import RunConfig
from panfm.data.store import Batch, ImageStore
from panfm.evaluate.embed import embed_store
from panfm.evaluate.label_sums import PENALTIES
from panfm.evaluate.probe_labels import LabelledStore
from panfm.evaluate.scores import auc
from panfm.evaluate.statistics import StatisticsReference, measure_store
from panfm.models import PanModel, build_model
from panfm.seeds import numpy_generator
from simulations.alone import train_alone
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import cohort_of, load_simulation
from simulations.harness import QUICKSTART, ArmJob, CohortJob, StudyOptions, chosen_arms, run_arms, study
from simulations.studies import _start_arms as public
from simulations.studies._cohorts import FrozenReader, write_files
from simulations.studies._federations import federate
from simulations.studies._tables import mean_sd, print_study
from simulations.study_result import StudyResult, Target

EXPERIMENT = QUICKSTART.with_name("real-pictures.toml")
SCRATCH_ARMS = ("statistics", "untrained", "views", "views-alone")
ARMS = (*SCRATCH_ARMS, *public.ARMS)
ROWS = (*SCRATCH_ARMS, *(f"{arm}{reading}" for arm in public.ARMS for reading in public.READINGS))
ROUNDS = {"short": 10, "long": 40}
LABEL_DRAWS = {5: 10, 20: 5, 100: 1}
"""Per cent of the labels -> number of draws of them."""
COMPARED = (
    ("views", "untrained"),
    ("views", "statistics"),
    ("views", "views-alone"),
    ("start", "statistics"),
    ("start-readout", "start"),
    ("start-readout", "statistics"),
    ("adapted", "start"),
    ("adapted-readout", "start-readout"),
)
"""Arm and baseline of every gain."""
TARGETS = (
    ("AUC, mean over cells, views minus untrained", "cells/views-minus-untrained", 0.02),
    ("share of cells with views at least untrained", "cells/views-at-least-untrained", 0.8),
    ("AUC, mean over cells, start-readout minus start", "cells/start-readout-minus-start", 0.02),
    ("AUC, mean over cells, start-readout minus statistics", "cells/start-readout-minus-statistics", 0.05),
    ("AUC, mean over cells, adapted-readout minus start-readout", "cells/adapted-readout-minus-start-readout", -0.002),
    ("the same of the worst stream", "worst-stream/adapted-readout-minus-start-readout", -0.005),
)
"""Claim, ratio that it is about, least value."""
_LEAST_OF_A_CLASS = 2

Indices = NDArray[np.int64]
Read = Callable[[ImageStore, str, Indices], NDArray[np.floating]]
"""Features [n, D] of one stream of the subjects at some indices of a store."""


Arms = Annotated[str, typer.Option(help="Only these arms, with commas between; each public one is read in two ways.")]

_ALL = ",".join(ARMS)
_READING = ":"
"""Between the reading and the metric, in what a job of a public start measures."""


@study(seeds=3, budgets=ROUNDS, unit="rounds of 20 steps")
def main(options: StudyOptions, budget: str, arms: Arms = _ALL) -> StudyResult:
    """Features of real pictures at 5, 20 and 100 per cent of the labels."""
    result = run(options, ROUNDS[budget], possible_arms(chosen_arms(arms, ARMS)))
    show(result)
    return result


def possible_arms(arms: Sequence[str]) -> list[str]:
    """The arms without those of a public start, if no weights are named; says so in one line.

    Raises:
        typer.BadParameter: no arm is left.
    """
    left = [arm for arm in arms if arm in SCRATCH_ARMS or public.weights()]
    if not left:
        raise typer.BadParameter(f"{', '.join(arms)}: need {public.ENVIRONMENT}, expected a file of weights in it")
    if len(left) < len(arms):
        rows = [row for row in ROWS if row not in SCRATCH_ARMS]
        Console(stderr=True, soft_wrap=True).print(f"{public.ENVIRONMENT} is not set: left out {', '.join(rows)}")
    return left


def run(options: StudyOptions, rounds: int, arms: Sequence[str] = SCRATCH_ARMS) -> StudyResult:
    """Run the study with some of the arms; questions are answered where all arms are there that they name."""
    described = {arm: arm_run(arm, 0, rounds).model_dump(mode="json", by_alias=True, exclude_none=True) for arm in arms}
    result = StudyResult("real-pictures", {"pairs": options.pairs(), "rounds": rounds, "runs": described})
    write = partial(write_draw, arms=tuple(arms))
    for job, measured in run_arms(options, arms, rounds, write, measure):
        for name, value in measured.items():
            reading, _, metric = name.rpartition(_READING)
            result.add(job.arm + reading, {metric: value})
    add_answers(result)
    result.targets += targets(result)
    return result


def arm_run(arm: str, seed: int, rounds: int) -> RunConfig:
    """The run of one arm; arms from scratch share one, and so do those with a public start."""
    if arm in public.ARMS:
        return public.start_run(EXPERIMENT, seed)
    return load_simulation(EXPERIMENT, [f"seed={seed}", f"train.rounds={rounds}"])


def write_draw(job: CohortJob, arms: Sequence[str] = SCRATCH_ARMS) -> Path:
    """Write the sites' folders, which are the same in every draw, and pictures as the arms read them."""
    runs = [arm_run(arm, 0, 1) for arm in arms]
    write_files(cohort_of(runs[0]), job.folder, runs[0])
    for run in runs[1:]:
        OpenedCohort.open(job.folder, run)
    return job.folder


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm and probe its features; metrics of a reading of a public start other than the first begin with it
    (`-readout:`)."""
    described = arm_run(job.arm, job.seed, job.length)
    cohort = OpenedCohort.open(job.cohort, described)
    if job.arm not in public.ARMS:
        return probe(trained_arm(job.arm, described, cohort, job.cohort), cohort, job.seed)
    model = public.model_of(job.arm, described, job.cohort)
    measured: dict[str, float] = {}
    for reading, features in public.READINGS.items():
        values = probe(public.StreamReader(model, described, features, cohort), cohort, job.seed)
        measured |= {f"{reading}{_READING}{metric}" if reading else metric: value for metric, value in values.items()}
    return measured


def probe(read: Read, cohort: OpenedCohort, seed: int) -> dict[str, float]:
    """Probe features of every stream that has several classes."""
    measured = {}
    for stream in probed_streams(cohort):
        [site] = [site for site in cohort.sites.values() if stream in site.store.images]
        fit, test = (_classed(cohort, read, stream, *place) for place in ((site, "train"), (cohort.holdout, "test")))
        for percent, draws in LABEL_DRAWS.items():
            chosen = (label_draw(fit[1], percent, seed, stream, draw) for draw in range(draws))
            values = [class_auc(fit[0][rows], fit[1][rows], *test) for rows in chosen]
            measured[f"auc_{stream}_{percent}"] = float(np.mean(values))
    means = {
        f"auc_mean_{percent}": float(np.mean([measured[f"auc_{name}_{percent}"] for name in probed_streams(cohort)]))
        for percent in LABEL_DRAWS
    }
    return measured | means


def pooled(model: PanModel, batch: Batch) -> Tensor:
    """CLS token after the last norm, and the mean of the tokens after each block: [B, (1 + blocks) D]."""
    encoded = model.encode(model.patch_features(batch.to(model.stream_of_patch.device)), keep_blocks=True)
    return torch.cat([encoded.cls, *(block.mean(dim=1) for block in encoded.blocks)], dim=1)


def read_model(model: PanModel, store: ImageStore, stream: str, indices: Indices) -> NDArray[np.floating]:
    """Pooled features of one model."""
    return embed_store(FrozenReader(model, partial(pooled, model)), store, indices, [stream])


def read_statistics(run: RunConfig, store: ImageStore, stream: str, indices: Indices) -> NDArray[np.floating]:
    """Plain statistics of the pictures."""
    own = ImageStore(store.subjects, store.splits, {stream: store.images[stream]}, {stream: store.rows[stream]})
    measured = measure_store(own, run.streams)
    return StatisticsReference.fit([(measured, indices)]).features(measured, indices)


def read_own_model(
    models: Mapping[str, PanModel], store: ImageStore, stream: str, indices: Indices
) -> NDArray[np.floating]:
    """Pooled features of the model of the site that has the stream."""
    [model] = [model for model in models.values() if stream in model.stream_names]
    return read_model(model, store, stream, indices)


def trained_arm(arm: str, run: RunConfig, cohort: OpenedCohort, folder: Path) -> Read:
    """Train an arm from scratch; returns how it reads pictures."""
    match arm:
        case "statistics":
            return partial(read_statistics, run)
        case "untrained":
            return partial(read_model, build_model(run))
        case "views":
            return partial(read_model, federate(run, folder).model)
        case "views-alone":
            probed = [name for name, store in cohort.stores.items() if set(store.images) & {*probed_streams(cohort)}]
            return partial(read_own_model, {name: train_alone(run, cohort.stores[name], name) for name in probed})
        case _:
            raise ValueError(f"arm {arm!r}: expected one of {', '.join(SCRATCH_ARMS)}")


def probed_streams(cohort: OpenedCohort) -> list[str]:
    """Streams whose pictures are of several classes."""
    return [stream for stream in cohort.holdout.store.images if len(class_names(cohort, stream)) > 1]


def class_names(cohort: OpenedCohort, stream: str) -> list[str]:
    """Labels that are the classes of a stream's modality."""
    return [name for name in cohort.labels if name.startswith(f"{parse_stream(stream)[1]}-")]


def _classed(
    cohort: OpenedCohort, read: Read, stream: str, place: LabelledStore, split: str
) -> tuple[NDArray[np.floating], Indices]:
    """Features [n, D] and classes [n] of the pictures of a stream in one split of a place."""
    rows = np.intersect1d(place.store.rows[stream], place.store.indices(split))
    return read(place.store, stream, rows), place.values(class_names(cohort, stream), rows).argmax(axis=1)


def label_draw(classes: Indices, percent: int, seed: int, stream: str, draw: int) -> Indices:
    """Rows of a share of each class, at least two of it, or all that there are."""
    generator, rows = numpy_generator(seed, "labels", stream, percent, draw), []
    for one in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == one))
        rows.append(members[: max(_LEAST_OF_A_CLASS, round(percent / 100 * len(members)))])
    return np.sort(np.concatenate(rows))


def class_auc(
    features: NDArray[np.floating], classes: Indices, test_features: NDArray[np.floating], test_classes: Indices
) -> float:
    """Mean AUC over the classes, each against the others, of ridge regressions of their indicators."""
    scaler, known = StandardScaler().fit(features.astype(np.float64)), np.unique(classes)
    with threadpool_limits(limits=1):
        ridge = RidgeCV(alphas=PENALTIES).fit(scaler.transform(features), (classes[:, None] == known).astype(float))
        scores = ridge.predict(scaler.transform(test_features))
    once = np.ones((1, len(test_classes)))
    return float(np.mean([auc(scores[:, at], test_classes == one, once)[0] for at, one in enumerate(known)]))


def add_answers(result: StudyResult) -> None:
    """Add gains in every mean, and over the cells: the mean, the worst stream's, and the share that is not behind."""
    rows = measured_rows(result)
    for arm, baseline in COMPARED:
        if not {arm, baseline} <= {*rows}:
            continue
        for percent in LABEL_DRAWS:
            result.add_gain(f"auc_mean_{percent}", arm, baseline, with_interval=True)
        cells = _cells(result)
        gains = {metric: np.array(result.gain(metric, arm, baseline)) for metric in cells}
        every = np.concatenate(list(gains.values()))
        streams = {metric.rpartition("_")[0] for metric in cells}
        worst = min(np.mean([gains[f"{stream}_{percent}"] for percent in LABEL_DRAWS]) for stream in streams)
        result.ratios[f"cells/{arm}-minus-{baseline}"] = float(every.mean())
        result.ratios[f"cells/{arm}-at-least-{baseline}"] = float((every >= 0.0).mean())
        result.ratios[f"worst-stream/{arm}-minus-{baseline}"] = float(worst)


def measured_rows(result: StudyResult) -> list[str]:
    """Arms that were measured, in the order of the table."""
    return [row for row in ROWS if row in {arm for _, arm in result.values}]


def _cells(result: StudyResult) -> list[str]:
    """Metrics of one stream at one share of labels."""
    named = dict.fromkeys(metric for metric, _ in result.values)
    return [metric for metric in named if not metric.startswith("auc_mean_")]


def targets(result: StudyResult) -> list[Target]:
    """Targets of the arms that were measured."""
    ratios = result.ratios
    return [Target(claim, ratios[name], least) for claim, name, least in TARGETS if name in ratios]


def show(result: StudyResult, console: Console | None = None) -> None:
    """Print mean and standard deviation of every metric and arm, the answers, and the targets."""
    metrics: Sequence[str] = [*_cells(result), *(f"auc_mean_{percent}" for percent in LABEL_DRAWS)]
    rows = measured_rows(result)
    table = Table("", *rows, title="real-pictures: mean ± sd over seeds")
    for metric in metrics:
        table.add_row(metric, *(mean_sd(result.values[metric, row]) for row in rows))
    print_study(result, table, console=console)
