"""Features of real pictures at few labels: what pre-training by views adds to an untrained model and to statistics.

Five sites with the pictures of six modalities (`configs/experiments/real-pictures.toml`):

    statistics   plain statistics of each picture and of its blocks
    untrained    the model before its first step
    views        the federated model
    views-alone  each site's own model, after as many local steps on its own pictures

With a public start, where $PANFM_WEIGHTS names its weights (`_start_arms.py`), each read in two ways: `start`,
`adapted`, `adapted-attention`, `adapted-private`, and the same with `-readout`; `adapted-heldout` and
`adapted-attention-heldout` add to `adapted` and `adapted-attention` what these show on a stream that no site has.

Models from scratch are read in the same way (`pooled`), and all features by the same probe (`_class_probe.py`), with
the same draws of labels.

    auc_<stream>_<percent>      mean AUC of the classes, over several draws of so many per cent of the labels
    auc_mean_<percent>          mean over the streams
    heldout_<stream>_<percent>  public start: the same where no site has trained on the stream
    rounds_kept                 adaptations: the last round that the gate keeps, 0 for the start
    rounds_kept_heldout         the same where no site has trained on the stream
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from panfm.config import RunConfig
from panfm.data.store import Batch, ImageStore
from panfm.evaluate.embed import embed_store
from panfm.evaluate.statistics import StatisticsReference, measure_store
from panfm.models import PanModel, build_model
from simulations.alone import train_alone
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import cohort_of, load_simulation
from simulations.harness import ArmJob, CohortJob, StudyOptions, chosen_arms, run_arms, study
from simulations.studies import _start_arms as public
from simulations.studies._class_probe import LABEL_DRAWS, Indices, Read, probe_streams, probed_streams
from simulations.studies._cohorts import FrozenReader, write_files
from simulations.studies._federations import federate
from simulations.studies._frozen_prefix import memory_of
from simulations.studies._tables import mean_sd, print_study
from simulations.study_result import StudyResult, Target

SCRATCH_ARMS = ("statistics", "untrained", "views", "views-alone")
PUBLIC_ARMS = (*public.ARMS, *public.HELD_OUT_ARMS)
ARMS = (*SCRATCH_ARMS, *PUBLIC_ARMS)
ROWS = (*SCRATCH_ARMS, *(f"{arm}{reading}" for arm in public.ARMS for reading in public.READINGS))
ROUNDS = {"short": 10, "long": 40}
COMPARED = (
    ("views", "untrained"),
    ("views", "statistics"),
    ("views", "views-alone"),
    ("views-alone", "untrained"),
    ("views-alone", "statistics"),
    ("start", "statistics"),
    ("start-readout", "start"),
    ("start-readout", "statistics"),
    *((f"{arm}{reading}", f"start{reading}") for arm in public.ADAPTATIONS for reading in public.READINGS),
)
"""Arm and baseline of every gain."""
TARGETS = (
    ("AUC, mean over cells, views minus untrained", "cells/views-minus-untrained", 0.02),
    ("share of cells with views at least untrained", "cells/views-at-least-untrained", 0.8),
    ("AUC, mean over cells, start-readout minus start", "cells/start-readout-minus-start", 0.02),
    ("AUC, mean over cells, start-readout minus statistics", "cells/start-readout-minus-statistics", 0.05),
    *(
        (f"AUC, {where}, {arm}-readout minus start-readout", f"{name}/{arm}-readout-minus-start-readout", least)
        for arm in ("adapted", "adapted-attention")
        for where, name, least in (
            ("mean over cells", "cells", -0.002),
            ("the worst stream", "worst-stream", -0.005),
            ("stream that no site trained on", "heldout", -0.002),
        )
    ),
    (
        f"AUC, mean over cells, {public.PRIVATE} minus start",
        f"cells/{public.PRIVATE}-minus-start",
        -0.01,
    ),
)
"""Claim, ratio that it is about, least value."""


Arms = Annotated[str, typer.Option(help="Only these arms, with commas between; each public one is read in two ways.")]

_ALL = ",".join(ARMS)
_READING = ":"
"""Between the reading and the metric, in what a job of a public start measures."""


@study(seeds=3, budgets=ROUNDS, unit="rounds of 20 steps")
def main(options: StudyOptions, budget: str, arms: Arms = _ALL) -> StudyResult:
    """Features of real pictures at 5, 20 and 100 per cent of the labels."""
    result = run(options, ROUNDS[budget], public.possible_arms(chosen_arms(arms, ARMS), SCRATCH_ARMS))
    show(result)
    return result


def run(options: StudyOptions, rounds: int, arms: Sequence[str] = SCRATCH_ARMS) -> StudyResult:
    """Run the study with some of the arms; questions are answered where all arms are there that they name."""
    described = {arm: arm_run(arm, 0, rounds).model_dump(mode="json", by_alias=True, exclude_none=True) for arm in arms}
    result = StudyResult("real-pictures", {"pairs": options.pairs(), "rounds": rounds, "runs": described})
    write = partial(write_draw, arms=tuple(arms))
    for job, measured in run_arms(options, arms, rounds, write, measure):
        for name, value in measured.items():
            reading, _, metric = name.rpartition(_READING)
            result.add(public.HELD_OUT_ARMS.get(job.arm, job.arm) + reading, {metric: value})
    add_answers(result)
    result.targets += targets(result)
    return result


def arm_run(arm: str, seed: int, rounds: int) -> RunConfig:
    """The run of one arm; arms from scratch share one."""
    if arm in PUBLIC_ARMS:
        return public.start_run(seed, arm)
    return load_simulation(public.EXPERIMENT, [f"seed={seed}", f"train.rounds={rounds}"])


def write_draw(job: CohortJob, arms: Sequence[str] = SCRATCH_ARMS) -> Path:
    """Write the sites' folders, which are the same in every draw, and pictures as the arms read them."""
    runs = [arm_run(arm, 0, 1) for arm in arms]
    write_files(cohort_of(runs[0]), job.folder, runs[0])
    for run in runs[1:]:
        OpenedCohort.open(job.folder, run)
    if {*arms} & {*public.HELD_OUT_ARMS}:
        public.write_without(job.folder, runs[-1], public.HELD_OUT)
    return job.folder


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm and probe its features; metrics of a reading of a public start other than the first begin with it
    (`-readout:`)."""
    described = arm_run(job.arm, job.seed, job.length)
    cohort = OpenedCohort.open(job.cohort, described)
    if job.arm not in PUBLIC_ARMS:
        return probe(trained_arm(job.arm, described, cohort, job.cohort), cohort, job.seed)
    return measure_public(job, described, cohort)


def measure_public(job: ArmJob, run: RunConfig, cohort: OpenedCohort) -> dict[str, float]:
    """Adapt a public start, unless the arm is the start itself, and probe its features by every reading."""
    memory = memory_of(job.seed)
    is_held_out = job.arm in public.HELD_OUT_ARMS
    folder = public.folder_without(job.cohort, public.HELD_OUT) if is_held_out else job.cohort
    trained = public.adapt(job.arm, run, folder, memory)
    measured: dict[str, float] = {}
    if job.arm != "start":
        measured["rounds_kept_heldout" if is_held_out else "rounds_kept"] = trained.number
    for reading, features in public.READINGS.items():
        read = public.StreamReader(trained.model, run, features, cohort, memory)
        if is_held_out:
            values = probe_streams(read, cohort, job.seed, [public.HELD_OUT], "heldout")
        else:
            values = probe(read, cohort, job.seed)
        measured |= _of_reading(reading, values)
    return measured | _as_held_out(measured) if job.arm == "start" else measured


def _of_reading(reading: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{reading}{_READING}{metric}" if reading else metric: value for metric, value in values.items()}


def _as_held_out(measured: Mapping[str, float]) -> dict[str, float]:
    """Select the measurements of the held-out stream, renamed from `auc_` to `heldout_`, for an untrained model."""
    of_stream = f"auc_{public.HELD_OUT}"
    return {
        name.replace(of_stream, f"heldout_{public.HELD_OUT}"): value
        for name, value in measured.items()
        if of_stream in name
    }


def probe(read: Read, cohort: OpenedCohort, seed: int) -> dict[str, float]:
    """Probe features of every stream that has several classes, and their mean over the streams."""
    streams = probed_streams(cohort)
    measured = probe_streams(read, cohort, seed, streams)
    means = {
        f"auc_mean_{percent}": float(np.mean([measured[f"auc_{name}_{percent}"] for name in streams]))
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


def add_answers(result: StudyResult) -> None:
    """Add gains in every mean, and over the cells: the mean, the worst stream's, and the share that is not behind; and
    in the held-out stream."""
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
        if held_out := _held_out_cells(result, arm, baseline):
            gains_there = [result.gain(metric, arm, baseline) for metric in held_out]
            result.ratios[f"heldout/{arm}-minus-{baseline}"] = float(np.mean(gains_there))


def measured_rows(result: StudyResult) -> list[str]:
    """Arms that were measured, in the order of the table."""
    return [row for row in ROWS if row in {arm for _, arm in result.values}]


def _cells(result: StudyResult) -> list[str]:
    """Metrics of one stream at one share of labels."""
    named = dict.fromkeys(metric for metric, _ in result.values if metric.startswith("auc_"))
    return [metric for metric in named if not metric.startswith("auc_mean_")]


def _held_out_cells(result: StudyResult, *arms: str) -> list[str]:
    """Metrics of the held-out stream that some arms have."""
    named = dict.fromkeys(metric for metric, _ in result.values if metric.startswith("heldout_"))
    return [metric for metric in named if all((metric, arm) in result.values for arm in arms)]


def targets(result: StudyResult) -> list[Target]:
    """Targets of the arms that were measured."""
    ratios = result.ratios
    return [Target(claim, ratios[name], least) for claim, name, least in TARGETS if name in ratios]


def show(result: StudyResult, console: Console | None = None) -> None:
    """Print mean and standard deviation of every metric and arm, the answers, and the targets."""
    rows, metrics = measured_rows(result), dict.fromkeys(metric for metric, _ in result.values)
    table = Table("", *rows, title="real-pictures: mean ± sd over seeds")
    for metric in metrics:
        table.add_row(metric, *(mean_sd(result.values.get((metric, row), [])) for row in rows))
    print_study(result, table, console=console)
