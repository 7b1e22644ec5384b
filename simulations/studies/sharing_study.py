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

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.evaluate.embed import embed_store
from panfm.evaluate.linear_probe import auc_per_label, fit_classifiers
from panfm.models import PanModel
from simulations.alone import train_alone, train_together
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import cohort_of, load_simulation, with_cohort
from simulations.harness import TRANSIENT, ArmJob, CohortJob, StudyOptions, run_arms, study
from simulations.studies._cohorts import resized, write_files
from simulations.studies._federations import federate
from simulations.studies._tables import mean_sd, print_study
from simulations.study_result import StudyResult, Target

ARMS = ("local", "plain", "grouped", "centralised")
ALL_ORGANS = "university-hospital"
_SUBJECTS_PER_SITE, _HOLDOUT = 300, 600
_ROUNDS = {"short": 15, "medium": 50, "long": 150}


@study(seeds=5, budgets=_ROUNDS, unit="rounds")
def main(options: StudyOptions, budget: str) -> StudyResult:
    """Local, plain, grouped and centralised training at one number of gradient steps."""
    result = run(options, _ROUNDS[budget])
    show(result)
    return result


def run(options: StudyOptions, rounds: int) -> StudyResult:
    """Run the study."""
    base = study_run(0, 0, rounds)
    result = StudyResult("sharing", {"pairs": options.pairs(), "run": base.model_dump(mode="json", by_alias=True)})
    for job, measured in run_arms(options, ARMS, rounds, write_draw, measure):
        result.add(job.arm, measured)
    for metric in ("mean/auc", "all-organs/auc"):
        for arm, baseline in (("grouped", "plain"), ("grouped", "local"), ("centralised", "grouped")):
            result.add_gain(metric, arm, baseline)
    result.targets += targets(result)
    return result


def targets(result: StudyResult) -> list[Target]:
    """Targets of sharing by groups, over each site's own organs."""
    ratios = result.ratios
    return [
        Target("share of pairs with grouped at least plain", ratios["mean/auc/grouped-at-least-plain"], 0.8),
        Target("grouped minus local", ratios["mean/auc/grouped-minus-local"], 0.0),
        Target("grouped minus centralised", -ratios["mean/auc/centralised-minus-grouped"], -0.01),
    ]


def study_run(draw: int, seed: int, rounds: int) -> RunConfig:
    """The run `transient` with larger sites."""
    base = load_simulation(TRANSIENT)
    cohort = resized(cohort_of(base), draw, subjects=_SUBJECTS_PER_SITE, holdout=_HOLDOUT)
    train = base.train.model_copy(update={"rounds": rounds})
    return with_cohort(base, cohort).model_copy(update={"seed": seed, "train": train})


def write_draw(job: CohortJob) -> Path:
    """Write one draw; returns its folder."""
    run = study_run(job.draw, 0, 1)
    return write_files(cohort_of(run), job.folder, run)


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm and probe the model that every site ends up with."""
    run = study_run(job.draw, job.seed, job.length)
    cohort = OpenedCohort.open(job.cohort, run)
    models = train_arm(job, run, cohort.stores)
    prober = _Prober(cohort)
    measured = {f"{name}/auc": prober.auc(models[name], tuple(store.images)) for name, store in cohort.stores.items()}
    measured["mean/auc"] = float(np.mean(list(measured.values())))
    measured["all-organs/auc"] = prober.auc(models[ALL_ORGANS], tuple(run.streams))
    return measured


def train_arm(job: ArmJob, run: RunConfig, stores: dict[str, ImageStore]) -> dict[str, PanModel]:
    """Site -> the model that it ends up with."""
    if job.arm == "local":
        return {name: train_alone(run, store, name) for name, store in stores.items()}
    if job.arm == "centralised":
        return dict.fromkeys(stores, train_together(run, list(stores.values())))
    sharing = run.sharing.model_copy(update={"rule": job.arm})
    return dict.fromkeys(stores, federate(run.model_copy(update={"sharing": sharing}), job.cohort).model)


class _Prober:
    """Linear probes over all labels, for any model and any of its streams."""

    def __init__(self, cohort: OpenedCohort) -> None:
        self.names = list(cohort.labels)
        self.train, self.test = cohort.together, cohort.holdout
        self.fit_labels, self.test_labels = (
            place.values(self.names, np.arange(len(place.store.subjects))) for place in (self.train, self.test)
        )

    def auc(self, model: PanModel, streams: Sequence[str]) -> float:
        """Mean AUC over labels; fitted on the training subjects that hold one of the streams."""
        holders = self.train.store.holders(np.arange(len(self.fit_labels)), streams)
        fit = embed_store(model, self.train.store, holders, streams)
        test = embed_store(model, self.test.store, np.arange(len(self.test_labels)), streams)
        probe = fit_classifiers(fit, self.fit_labels[holders], self.names)
        once = np.ones((1, len(test)))
        return float(np.nanmean(auc_per_label(probe.score(test), self.test_labels, once)))


def show(result: StudyResult, console: Console | None = None) -> None:
    """Print mean and sd per arm, the paired differences, and the targets."""
    table = Table("AUC", *ARMS, title="sharing: mean and sd over pairs")
    for metric in dict.fromkeys(metric for metric, _ in result.values):
        table.add_row(metric.removesuffix("/auc"), *(mean_sd(result.values[metric, arm]) for arm in ARMS))
    print_study(result, table, console=console)
