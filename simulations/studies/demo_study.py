"""Worth of the federation of `make demo`: its model beside an untrained one, plain statistics and each site alone.

Every pair is the demo with a seed of its own for training and for the phantom's draw:

    federated     all sites together
    untrained     the same model before training
    statistics    plain statistics of the images
    tokenizer     everything that the tokenizer reads of the images, without a model
    site:<name>   the model that a site reaches by itself, in as many local steps
    best-site     in each metric the best of the sites

Features of all arms are read by the same linear probe, fitted on the sites' training patients as they were scanned and
tested on complete patients of no site. `auc` is fitted on all labels, `auc_100` on those of 100 patients (mean over
draws of these), and `auc_missing_<n>` tests the first probe with n organs of each held-out patient taken away.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from panfm.config import RunConfig
from panfm.evaluate.result import ProbeResult
from simulations.cohorts.prepare import load_simulation, prepare_cohort
from simulations.finish import probe_run
from simulations.harness import QUICKSTART, StudyOptions, run_jobs, study
from simulations.studies._federations import federated
from simulations.studies._tables import mean_sd, print_study
from simulations.study_result import StudyResult, Target

REFERENCES = ("untrained", "statistics")
"""What the federation has to be ahead of by the margin."""
BEST_SITE = "best-site"
_SITE = "site:"
_MARGIN = 0.05


@dataclass(frozen=True)
class DemoJob:
    """The demo with one seed and one draw."""

    draw: int
    seed: int

    def __str__(self) -> str:
        return f"draw {self.draw}, seed {self.seed}"


@study(seeds=3, draws=None)
def main(options: StudyOptions) -> StudyResult:
    """Federated features against untrained ones, plain statistics and each site alone, as `make demo` compares them."""
    result = run(options)
    show(result)
    return result


def run(options: StudyOptions) -> StudyResult:
    """Run the study."""
    base = load_simulation(QUICKSTART)
    result = StudyResult("demo", {"pairs": options.pairs(), "run": base.model_dump(mode="json", by_alias=True)})
    jobs = [DemoJob(draw, seed) for draw, seed in options.pairs()]
    for measured in run_jobs(measure, jobs, workers=1, keep_for=options.json):  # a job trains sites in processes
        for arm, values in by_arm(measured).items():
            result.add(arm, values)
    for metric in ("auc", "auc_100"):
        for arm in (*REFERENCES, "tokenizer", BEST_SITE):
            result.add_gain(metric, "federated", arm)
    result.targets += targets(result)
    return result


def measure(job: DemoJob) -> dict[str, float]:
    """Run the demo and probe its arms; returns `<arm>/<metric>` -> value."""
    run, quiet = demo_run(job), Console(quiet=True)
    cohort = prepare_cohort(run, quiet)
    with federated(run, cohort) as folder:
        probe = probe_run(run, cohort, folder.path, quiet, with_all_grids=True)
    return {f"{arm}/{metric}": value for arm, values in scores(probe).items() for metric, value in values.items()}


def demo_run(job: DemoJob) -> RunConfig:
    """The demo's run, with the seeds of a job."""
    return load_simulation(QUICKSTART, [f"cohort.seed={job.draw}", f"seed={job.seed}"])


def scores(probe: ProbeResult) -> dict[str, dict[str, float]]:
    """Arm -> metric -> value, of the arms that were probed."""
    return {
        arm: {metric: value for metric, value in grid.items() if metric == "auc" or metric.startswith("auc_missing_")}
        | dict(probe.few_labels.get(arm, {}))
        for arm, grid in probe.missing.items()
    }


def by_arm(measured: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Values of `measure` by arm and metric, and those of the best site."""
    arms: dict[str, dict[str, float]] = {}
    for name, value in measured.items():
        arm, _, metric = name.partition("/")
        arms.setdefault(arm, {})[metric] = value
    sites = [values for arm, values in arms.items() if arm.startswith(_SITE)]
    return arms | {BEST_SITE: {metric: float(np.nanmax([site[metric] for site in sites])) for metric in sites[0]}}


def targets(result: StudyResult) -> list[Target]:
    """Targets of the smallest gain over the pairs: over the best reference, and over the best site alone."""

    def smallest(metric: str, *arms: str) -> float:
        gains = np.array([result.gain(metric, "federated", arm) for arm in arms])
        return float(gains.min())

    return [
        Target("smallest gain over untrained and statistics", smallest("auc", *REFERENCES), _MARGIN),
        Target("smallest gain over the best site", smallest("auc", BEST_SITE), 0.0),
        Target("smallest gain over untrained and statistics at 100 labels", smallest("auc_100", *REFERENCES), 0.0),
        Target("smallest gain over the best site at 100 labels", smallest("auc_100", BEST_SITE), 0.0),
    ]


def show(result: StudyResult, console: Console | None = None) -> None:
    """Print mean and sd of every arm, the mean gains, and the targets."""
    arms = list(dict.fromkeys(arm for _, arm in result.values))
    metrics = [
        metric for metric in dict.fromkeys(metric for metric, _ in result.values) if (metric, arms[0]) in result.values
    ]
    shown = [metric for metric in metrics if metric in ("auc", "auc_100", "auc_missing_1", "auc_missing_3")]
    table = Table("arm", *shown, title=f"demo: mean ± sd over {len(result.config['pairs'])} seeds and draws")
    for arm in arms:
        table.add_row(arm, *(mean_sd(result.values.get((metric, arm), [])) for metric in shown))
    print_study(result, table, console=console)
