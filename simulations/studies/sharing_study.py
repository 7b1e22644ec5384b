"""Local, plain, grouped and centralised training, compared at the same number of steps.

Five phantom hospitals with unequal organs, the same subjects and the same total of gradient steps in every arm:

    local        every site trains by itself
    plain        a federation that averages everything from everyone with one weight
    grouped      a federation that averages each group over the sites that trained it (the default)
    centralised  all images in one place; as many steps as all sites together take

`auc` of a site probes what its own organs tell with the model that the site ends up with; `mean` is over sites;
`all-organs` gives a model every organ it can read (`local`: the university hospital's, which has them all).
Probes are fitted on all sites' training subjects as they were scanned, and tested on complete held-out subjects.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from panfm.config import RunConfig, site_folders
from panfm.data.store import ImageStore, join_stores
from panfm.evaluate.embed import embed_store
from panfm.evaluate.linear_probe import auc_per_label, fit_classifiers
from panfm.evaluate.probe_labels import LabelledStore, read_label_info
from panfm.models import PanModel
from simulations.alone import train_alone
from simulations.cohorts.phantom import PhantomCohort
from simulations.cohorts.prepare import cohort_of, load_simulation, with_cohort
from simulations.harness import (
    QUICKSTART,
    Draws,
    FirstSeed,
    JsonFile,
    Seeds,
    StudyOptions,
    StudyResult,
    Target,
    check_writable,
    run_jobs,
    steps_of,
)
from simulations.studies._federations import federate, mean_sd

ARMS = ("local", "plain", "grouped", "centralised")
ALL_ORGANS = "university-hospital"
_SUBJECTS_PER_SITE, _HOLDOUT = 300, 600
_ROUNDS = {"short": 15, "medium": 50, "long": 150}


@dataclass(frozen=True)
class ArmJob:
    """One arm, trained once and measured."""

    draw: int
    seed: int
    arm: str
    rounds: int
    cohort: Path

    def __str__(self) -> str:
        return f"phantom {self.draw}, seed {self.seed}, {self.arm}, {self.rounds} rounds"


@dataclass(frozen=True)
class CohortJob:
    """One draw of the cohort, written as files."""

    draw: int
    folder: Path

    def __str__(self) -> str:
        return f"phantom {self.draw}: writing files"


def main(
    seeds: Seeds = 5,
    draws: Draws = 1,
    first_seed: FirstSeed = 0,
    budget: Annotated[str, typer.Option(help="short, medium or long: 15, 50 or 150 rounds.")] = "short",
    json: JsonFile = None,
) -> None:
    """Local, plain, grouped and centralised training at one number of gradient steps."""
    size = steps_of(budget, _ROUNDS)
    check_writable(json)
    result = run(StudyOptions(seeds, draws, first_seed, json=json), size)
    show(result)
    if json:
        result.write(json)


def run(options: StudyOptions, rounds: int) -> StudyResult:
    """Run the study."""
    base = study_run(0, 0, rounds)
    result = StudyResult("sharing", {"pairs": options.pairs(), "run": base.model_dump(mode="json", by_alias=True)})
    with tempfile.TemporaryDirectory() as scratch:
        draws = options.draw_numbers()
        cohorts = run_jobs(write_draw, [CohortJob(draw, Path(scratch) / str(draw)) for draw in draws])
        folders = dict(zip(draws, cohorts, strict=True))
        jobs = [ArmJob(draw, seed, arm, rounds, folders[draw]) for draw, seed in options.pairs() for arm in ARMS]
        done = run_jobs(measure, jobs, workers=options.workers, keep_for=options.json)
        for job, measured in zip(jobs, done, strict=True):
            result.add(job.arm, measured)
    for metric in ("mean/auc", "all-organs/auc"):
        for arm, baseline in (("grouped", "plain"), ("grouped", "local"), ("centralised", "grouped")):
            gain = np.asarray(result.gain(metric, arm, baseline))
            result.ratios[f"{metric}/{arm}-minus-{baseline}"] = float(gain.mean())
            result.ratios[f"{metric}/{arm}-at-least-{baseline}"] = float((gain >= 0).mean())
    result.targets += targets(result)
    return result


def targets(result: StudyResult) -> list[Target]:
    """Targets of sharing by groups, over each site's own organs."""
    found = result.ratios
    return [
        Target("share of pairs with grouped at least plain", found["mean/auc/grouped-at-least-plain"], 0.8),
        Target("grouped minus local", found["mean/auc/grouped-minus-local"], 0.0),
        Target("grouped minus centralised", -found["mean/auc/centralised-minus-grouped"], -0.01),
    ]


def study_run(draw: int, seed: int, rounds: int) -> RunConfig:
    """The quickstart with larger sites."""
    base = load_simulation(QUICKSTART)
    cohort = cohort_of(base)
    assert isinstance(cohort, PhantomCohort)
    sites = {name: site.model_copy(update={"subjects": _SUBJECTS_PER_SITE}) for name, site in cohort.sites.items()}
    changed = {"seed": draw, "sites": sites, "holdout_subjects": _HOLDOUT}
    train = base.train.model_copy(update={"rounds": rounds})
    return with_cohort(base, cohort.model_copy(update=changed)).model_copy(update={"seed": seed, "train": train})


def write_draw(job: CohortJob) -> Path:
    """Write one draw and build its caches; returns its folder."""
    run = study_run(job.draw, 0, 1)
    cohort_of(run).write(job.folder, run.streams)
    for folder in (*site_folders(job.folder / "sites"), job.folder / "holdout"):
        LabelledStore.open(folder, run.streams)
    return job.folder


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm and probe the model that every site ends up with."""
    run = study_run(job.draw, job.seed, job.rounds)
    folders = site_folders(job.cohort / "sites")
    places = {folder.name: LabelledStore.open(folder, run.streams) for folder in folders}
    models = train_arm(job, run, {name: place.store for name, place in places.items()})
    held = {name: tuple(place.store.images) for name, place in places.items()}
    prober = _Prober(job.cohort, run, list(places.values()))
    measured = {f"{name}/auc": prober.auc(models[name], held[name]) for name in places}
    measured["mean/auc"] = float(np.mean(list(measured.values())))
    measured["all-organs/auc"] = prober.auc(models[ALL_ORGANS], tuple(run.streams))
    return measured


def train_arm(job: ArmJob, run: RunConfig, stores: dict[str, ImageStore]) -> dict[str, PanModel]:
    """Site -> the model that it ends up with."""
    if job.arm == "local":
        return {name: train_alone(run, store, name) for name, store in stores.items()}
    if job.arm == "centralised":
        steps = run.train.local_steps * len(stores)
        train = run.train.model_copy(update={"local_steps": steps})
        model = train_alone(run.model_copy(update={"train": train}), join_stores(list(stores.values())), "everyone")
        return dict.fromkeys(stores, model)
    sharing = run.sharing.model_copy(update={"rule": job.arm})
    return dict.fromkeys(stores, federate(run.model_copy(update={"sharing": sharing}), job.cohort).model)


class _Prober:
    """Linear probes over all labels, for any model and any of its streams."""

    def __init__(self, cohort: Path, run: RunConfig, places: Sequence[LabelledStore]) -> None:
        self.names = list(read_label_info(cohort))
        self.train = join_stores([place.store for place in places])
        self.test = LabelledStore.open(cohort / "holdout", run.streams)
        everyone = [np.arange(len(place.store.subjects)) for place in places]
        self.fit_labels = np.concatenate(
            [place.values(self.names, at) for place, at in zip(places, everyone, strict=True)]
        )
        self.test_labels = self.test.values(self.names, np.arange(len(self.test.store.subjects)))

    def auc(self, model: PanModel, streams: Sequence[str]) -> float:
        """Mean AUC over labels; fitted on the training subjects that hold one of the streams."""
        holders = np.unique(np.concatenate([self.train.rows[stream] for stream in streams]))
        fit = embed_store(model, self.train, holders, streams)
        test = embed_store(model, self.test.store, np.arange(len(self.test_labels)), streams)
        probe = fit_classifiers(fit, self.fit_labels[holders], self.names)
        once = np.ones((1, len(test)))
        return float(np.nanmean(auc_per_label(probe.score(test), self.test_labels, once)))


def show(result: StudyResult, console: Console | None = None) -> None:
    """Mean and sd per arm, and the paired differences."""
    console = console or Console(soft_wrap=True, highlight=False)
    metrics = list(dict.fromkeys(metric for metric, _ in result.values))
    table = Table("AUC", *ARMS, title="sharing: mean and sd over pairs")
    for metric in metrics:
        table.add_row(metric.removesuffix("/auc"), *(mean_sd(result.values[metric, arm]) for arm in ARMS))
    console.print(table)
    for name, value in result.ratios.items():
        console.print(f"{name}: {value:+.4f}")
    for target in result.targets:
        console.print(str(target))
