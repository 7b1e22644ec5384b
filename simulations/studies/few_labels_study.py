"""Few labels at every site: does a ridge probe from summed statistics pay?

Four sites share a task with 10 to 40 labels each, of which each has the classes in other shares (drawn from a flat
Dirichlet distribution). All read their pictures with the same frozen model. Tasks are the classes of the real pictures
of a modality ($PANFM_REAL_DATA): ultrasound (benign, malignant, normal), xray (hand, chest, child healthy or with
pneumonia), ct (abdomen, chest, head). A fifth of the patients is held out in every draw.

    local              every site fits its own probe; mean over sites of the AUC
    score-mean         the mean of those probes' scores
    federated          one probe from the sums of the sites (panfm/evaluate/federated_probe.py)
    federated-floors   the same where every site keeps the default floor of 8 patients per class
    pooled             scikit-learn's ridge on all labels in one place

All are ridge regressions of the classes on standardised features, with the same penalties and leave-one-out choice.

    auc_<task>_<labels>     mean over the classes of the held-out AUC, at so many labels per site; a class that a site
                            never saw, or a probe for which nothing was given, has .5
    auc_mean_<labels>       mean over the tasks
    gap_<task>_<labels>     largest difference of a score from pooled
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from panfm.config import RunConfig
from panfm.config.site_description import LimitsConfig
from panfm.data.read import read_image
from panfm.data.store import ImageStore
from panfm.evaluate.embed import embed_store
from panfm.evaluate.federated_probe import LabelledSite, probe_together
from panfm.evaluate.label_sums import PENALTIES, Floats
from panfm.evaluate.linear_probe import auc_per_label
from panfm.models import build_model
from panfm.seeds import numpy_generator
from simulations.cohorts.prepare import load_simulation
from simulations.cohorts.real_images import real_data
from simulations.cohorts.real_modalities import FOLDER, Picture, read_pictures
from simulations.harness import QUICKSTART, StudyOptions, run_jobs, study
from simulations.studies._tables import mean_sd, print_study
from simulations.study_result import StudyResult, Target

ARMS = ("local", "score-mean", "federated", "federated-floors", "pooled")
TASKS = {"ultrasound": "breast-ultrasound", "xray": "chest-xray", "ct": "abdomen-ct"}
"""Task, which is a modality, -> the stream that it is read as."""
LABELS = (10, 20, 40)
"""Labels of every site."""
_SITES, _HELD_OUT = 4, 0.2
_CONCENTRATION = 1.0
"""Concentration of the Dirichlet distribution of a site's classes; the larger, the more alike sites are."""
_FLOOR = LimitsConfig().smallest_batch
_EXPERIMENT = QUICKSTART.with_name("real-modalities.toml")


@dataclass(frozen=True)
class DrawJob:
    """One draw of the sites' labels, and one seed of the frozen model."""

    draw: int
    seed: int

    def __str__(self) -> str:
        return f"draw {self.draw}, seed {self.seed}"


@dataclass(frozen=True)
class LabelledPictures:
    """Frozen features and classes of a task's pictures."""

    features: NDArray[np.float32]
    """[N, D]"""
    classes: Floats
    """[N, C], one-hot."""
    groups: NDArray[np.str_]
    """[N], the patient where known."""


@study(seeds=5)
def main(options: StudyOptions) -> StudyResult:
    """Ridge probes at few labels per site: local, mean of scores, federated from sums, pooled."""
    result = run(options)
    show(result)
    return result


def run(options: StudyOptions) -> StudyResult:
    """Run the study."""
    described = study_run(0).model_dump(mode="json", by_alias=True)
    result = StudyResult("few-labels", {"pairs": options.pairs(), "run": described, "sites": _SITES, "labels": LABELS})
    jobs = [DrawJob(draw, seed) for draw, seed in options.pairs()]
    for measured in run_jobs(measure, jobs, workers=options.workers, keep_for=options.json):
        for arm in ARMS:
            result.add(arm, {name.partition("/")[2]: value for name, value in measured.items() if _is_of(arm, name)})
    for labels in LABELS:
        for baseline in ("local", "score-mean"):
            result.add_gain(f"auc_mean_{labels}", "federated", baseline)
    result.targets += targets(result)
    return result


def targets(result: StudyResult) -> list[Target]:
    """Targets of the federated probe."""
    gains = [result.ratios[f"auc_mean_{labels}/federated-minus-local"] for labels in LABELS]
    gaps = [value for (metric, _), values in result.values.items() if metric.startswith("gap_") for value in values]
    return [
        Target(
            "federated minus mean local AUC over the tasks, at the least of the numbers of labels", min(gains), 0.05
        ),
        Target("minus the largest difference of a federated score from pooled", -max(gaps), -1e-6),
    ]


def study_run(seed: int) -> RunConfig:
    """The frozen model: the seed's parameters, read at every block."""
    return load_simulation(_EXPERIMENT, [f"seed={seed}", "features.pooling=layers"])


def measure(job: DrawJob) -> dict[str, float]:
    """Measure all arms on one draw; `<arm>/<metric>` -> value."""
    measured: dict[str, float] = {}
    run = study_run(job.seed)
    for task, stream in TASKS.items():
        measured |= measure_task(read_task(run, task, stream), task, job.draw, job.seed)
    for arm in ARMS:
        for labels in LABELS:
            of_tasks = [measured[f"{arm}/auc_{task}_{labels}"] for task in TASKS]
            measured[f"{arm}/auc_mean_{labels}"] = float(np.mean(of_tasks))
    return measured


def read_task(run: RunConfig, task: str, stream: str) -> LabelledPictures:
    """Read the pictures of a modality and embed them with the seed's model."""
    source = real_data(FOLDER) / FOLDER
    pictures = [picture for picture in read_pictures(source) if picture["modality"] == task]
    images = np.stack([read_image(source / picture["file"], stream, run.streams[stream]) for picture in pictures])
    everybody = np.arange(len(pictures))
    store = ImageStore(tuple(map(_file, pictures)), ("train",) * len(pictures), {stream: images}, {stream: everybody})
    names = sorted({picture["class"] for picture in pictures})
    classes = np.array([[float(picture["class"] == name) for name in names] for picture in pictures])
    groups = np.array([picture["subject_group"] for picture in pictures])
    return LabelledPictures(embed_store(build_model(run), store, everybody), classes, groups)


def measure_task(pictures: LabelledPictures, task: str, draw: int, seed: int) -> dict[str, float]:
    """Measure all arms on one task."""
    drawn, held_out = draw_sites(pictures, task, draw, seed)
    features, truth = pictures.features, pictures.classes
    measured: dict[str, float] = {}
    for labels in LABELS:
        sites = [
            LabelledSite(f"site-{number}", features[at[:labels]], {task: truth[at[:labels]]}, 1)
            for number, at in enumerate(drawn)
        ]
        scores = score_arms(sites, task, features[held_out])
        name = f"{task}_{labels}"
        measured |= {f"{arm}/auc_{name}": _auc(scores[arm], truth[held_out]) for arm in ARMS[1:]}
        own = [_auc(_scores(task, [site], features[held_out]), truth[held_out]) for site in sites]
        measured[f"local/auc_{name}"] = float(np.mean(own))
        measured[f"federated/gap_{name}"] = float(np.abs(scores["federated"] - scores["pooled"]).max())
    return measured


def draw_sites(
    pictures: LabelledPictures, task: str, draw: int, seed: int
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Labelled patients of every site, in random order, and the patients that are held out.

    Every site takes the most labels that are asked for, by its own shares of the classes, as long as there are any.
    """
    generator = numpy_generator(seed, "few-labels", task, draw)
    groups = generator.permutation(np.unique(pictures.groups))
    is_held_out = np.isin(pictures.groups, groups[: round(_HELD_OUT * len(groups))])
    pools = [list(generator.permutation(np.flatnonzero(~is_held_out & (column == 1)))) for column in pictures.classes.T]
    sites = []
    for _ in range(_SITES):
        shares = generator.dirichlet(np.full(len(pools), _CONCENTRATION))
        chosen: list[int] = []
        while len(chosen) < max(LABELS):
            left = shares * [len(pool) > 0 for pool in pools]
            left = left if left.sum() > 0 else np.array([float(len(pool)) for pool in pools])
            chosen.append(pools[generator.choice(len(pools), p=left / left.sum())].pop())
        sites.append(np.array(chosen))
    return sites, np.flatnonzero(is_held_out)


def score_arms(sites: Sequence[LabelledSite], task: str, test: NDArray[np.float32]) -> Mapping[str, Floats]:
    """Scores [n, C] of test features by every arm but `local`."""
    floors = [LabelledSite(site.name, site.features, site.targets, _FLOOR) for site in sites]
    fit = np.concatenate([site.features for site in sites]).astype(np.float64)
    ridge = make_pipeline(StandardScaler(), RidgeCV(alphas=PENALTIES))
    ridge.fit(fit, np.concatenate([site.targets[task] for site in sites]))
    return {
        "score-mean": np.mean([_scores(task, [site], test) for site in sites], axis=0),
        "federated": _scores(task, sites, test),
        "federated-floors": _scores(task, floors, test),
        "pooled": ridge.predict(test.astype(np.float64)),
    }


def _scores(task: str, sites: Sequence[LabelledSite], test: NDArray[np.float32]) -> Floats:
    """Scores by the probe of some sites together; all alike where they gave nothing."""
    probes = probe_together(sites).probes
    return probes[task].score(test) if task in probes else np.zeros((len(test), sites[0].targets[task].shape[1]))


def _auc(scores: Floats, truth: Floats) -> float:
    return float(np.nanmean(auc_per_label(scores, truth, np.ones((1, len(truth))))))


def _is_of(arm: str, name: str) -> bool:
    return name.partition("/")[0] == arm


def _file(picture: Picture) -> str:
    return Path(picture["file"]).stem


def show(result: StudyResult, console: Console | None = None) -> None:
    """Print mean and sd per arm, the gains, and the targets."""
    table = Table("AUC", *ARMS, title="few labels per site: mean and sd over draws")
    for metric in dict.fromkeys(metric for metric, _ in result.values if metric.startswith("auc_")):
        table.add_row(metric.removeprefix("auc_"), *(mean_sd(result.values[metric, arm]) for arm in ARMS))
    print_study(result, table, console=console)
