"""Features of real pictures at few labels: what pre-training by views adds to an untrained model and to statistics.

Five sites with the pictures of six modalities (`configs/experiments/real-pictures.toml`):

    statistics   plain statistics of each picture and of its blocks
    untrained    the model before its first step
    views        the federated model
    views-alone  each site's own model, after as many local steps on its own pictures

The models of all arms are read in the same way (`pooled`), and all features by the same probe: ridge regressions of the
classes within a modality, penalty by leave-one-out. They are fitted on 5, 20 and 100 per cent of the labelled training
pictures, at least two of a class, drawn alike for all arms, and tested on the data's own test split. Modalities of one
class have no metric. `auc_<stream>_<percent>` is the mean AUC of the classes, over several draws of the labels,
`auc_mean_<percent>` the mean over the streams.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
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
from panfm.evaluate.probe_labels import LabelledStore
from panfm.evaluate.scores import auc
from panfm.evaluate.statistics import StatisticsReference, measure_store
from panfm.models import PanModel, build_model
from panfm.seeds import numpy_generator
from simulations.alone import train_alone
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import cohort_of, load_simulation
from simulations.harness import QUICKSTART, ArmJob, CohortJob, StudyOptions, run_arms, study
from simulations.studies._cohorts import FrozenReader, write_files
from simulations.studies._federations import federate
from simulations.studies._tables import mean_sd, print_study
from simulations.study_result import StudyResult, Target

EXPERIMENT = QUICKSTART.with_name("real-pictures.toml")
ARMS = ("statistics", "untrained", "views", "views-alone")
ROUNDS = {"short": 10, "long": 40}
LABEL_DRAWS = {5: 10, 20: 5, 100: 1}
"""Per cent of the labels -> number of draws of them."""
_LEAST_OF_A_CLASS = 2
_PENALTIES = np.logspace(-1, 5, 13)

Indices = NDArray[np.int64]
Read = Callable[[ImageStore, str, Indices], NDArray[np.floating]]
"""Features [n, D] of one stream of the subjects at some indices of a store."""


@study(seeds=3, budgets=ROUNDS, unit="rounds of 20 steps")
def main(options: StudyOptions, budget: str) -> StudyResult:
    """Features of real pictures at 5, 20 and 100 per cent of the labels."""
    result = run(options, ROUNDS[budget])
    show(result)
    return result


def run(options: StudyOptions, rounds: int) -> StudyResult:
    """Run the study."""
    described = arm_run(0, rounds).model_dump(mode="json", by_alias=True, exclude_none=True)
    result = StudyResult("real-pictures", {"pairs": options.pairs(), "rounds": rounds, "run": described})
    for job, measured in run_arms(options, list(ARMS), rounds, write_draw, measure):
        result.add(job.arm, measured)
    add_answers(result)
    result.targets += targets(result)
    return result


def arm_run(seed: int, rounds: int) -> RunConfig:
    """The run that all arms share."""
    return load_simulation(EXPERIMENT, [f"seed={seed}", f"train.rounds={rounds}"])


def write_draw(job: CohortJob) -> Path:
    """Write the sites' folders, which are the same in every draw; returns their folder."""
    described = arm_run(0, 1)
    return write_files(cohort_of(described), job.folder, described)


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm and probe its features of every stream that has several classes."""
    described = arm_run(job.seed, job.length)
    cohort = OpenedCohort.open(job.cohort, described)
    read, measured = trained_arm(job.arm, described, cohort, job.cohort), {}
    for stream in probed_streams(cohort):
        [site] = [site for site in cohort.sites.values() if stream in site.store.images]
        fit, test = (_classed(cohort, read, stream, *place) for place in ((site, "train"), (cohort.holdout, "test")))
        for percent, draws in LABEL_DRAWS.items():
            chosen = (label_draw(fit[1], percent, job.seed, stream, draw) for draw in range(draws))
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
    """Train an arm; returns how it reads pictures."""
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
            raise ValueError(f"arm {arm!r}: expected one of {', '.join(ARMS)}")


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
        ridge = RidgeCV(alphas=_PENALTIES).fit(scaler.transform(features), (classes[:, None] == known).astype(float))
        scores = ridge.predict(scaler.transform(test_features))
    once = np.ones((1, len(test_classes)))
    return float(np.mean([auc(scores[:, at], test_classes == one, once)[0] for at, one in enumerate(known)]))


def add_answers(result: StudyResult) -> None:
    """Add the gains of the federated model on the other arms, and the share of cells in which it is not behind."""
    for percent in LABEL_DRAWS:
        for baseline in ("untrained", "statistics", "views-alone"):
            result.add_gain(f"auc_mean_{percent}", "views", baseline, with_interval=True)
    gains = np.concatenate([result.gain(metric, "views", "untrained") for metric in _cells(result)])
    result.ratios["cells/views-minus-untrained"] = float(gains.mean())
    result.ratios["cells/views-at-least-untrained"] = float((gains >= 0.0).mean())


def _cells(result: StudyResult) -> list[str]:
    """Metrics of one stream at one share of labels."""
    named = dict.fromkeys(metric for metric, _ in result.values)
    return [metric for metric in named if not metric.startswith("auc_mean_")]


def targets(result: StudyResult) -> list[Target]:
    """Targets of the federated model against the untrained one."""
    ratios = result.ratios
    return [
        Target("AUC, mean over cells, views minus untrained", ratios["cells/views-minus-untrained"], 0.02),
        Target("share of cells with views at least untrained", ratios["cells/views-at-least-untrained"], 0.8),
    ]


def show(result: StudyResult, console: Console | None = None) -> None:
    """Print mean and standard deviation of every metric and arm, the answers, and the targets."""
    metrics: Sequence[str] = [*_cells(result), *(f"auc_mean_{percent}" for percent in LABEL_DRAWS)]
    table = Table("", *ARMS, title="real-pictures: mean ± sd over seeds")
    for metric in metrics:
        table.add_row(metric, *(mean_sd(result.values[metric, arm]) for arm in ARMS))
    print_study(result, table, console=console)
