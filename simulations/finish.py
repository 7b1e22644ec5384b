"""Work after the last round: probes the federated model beside what each site reaches alone.

Every site trains once more by itself, with the same start and number of local steps, and without noise in a private
run, since nothing leaves; then all frozen models are probed on the same held-out subjects, and tables and report are
written.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from panfm.config import RunConfig, dump_toml, load_site, parse_run, site_folders
from panfm.data.task_labels import open_training_store
from panfm.errors import DataError
from panfm.evaluate.embed import load_model
from panfm.evaluate.leakage import leakage
from panfm.evaluate.probe_cohort import evaluate_cohort
from panfm.evaluate.probe_file import read_probes
from panfm.evaluate.result import ProbeResult, Score, write_result
from panfm.models import PanModel, build_model
from panfm.models.private_part import load_with_fresh_private
from panfm.models.whitening import save_whitening
from panfm.privacy.guarantees import privacy_label
from panfm.report.console_tables import print_tables
from panfm.report.report_data import Cost, ReportData, write_report_data
from panfm.report.report_page import write_report
from panfm.report.run_files import read_run
from panfm.site.state import RUNS, StateStore
from server.run_folder import RunFolder
from server.tracking import log_images
from server.tracking_config import tracking_of
from simulations.alone import train_alone, with_own_constants
from simulations.cohorts.cohort_labels import read_cohort_labels
from simulations.cohorts.opened import OpenedCohort
from simulations.embedding_map import embedding_map
from simulations.example_slices import example_slices, png_files
from simulations.expert_map import expert_map
from simulations.harness import background_jobs, run_jobs
from simulations.kept_models import kept_or_trained, model_key
from simulations.probe_sites import probe_sites
from simulations.site_benefit import MOST_FEATURES, site_benefits
from simulations.task_scores import score_task

_STUDENT = "student."
"""Prefix of a site's own parameters in its private state."""
_GRID_ARMS = ("federated", "untrained", "statistics", "tokenizer")


@dataclass(frozen=True)
class AloneJob:
    """One site's training by itself."""

    run_toml: str
    folder: Path
    run_dir: Path

    def __str__(self) -> str:
        return f"{self.folder.name} alone"


def train_site_alone(job: AloneJob) -> PanModel:
    """The model that a site reaches without the others; one that an earlier run has trained is used again."""
    run = parse_run(job.run_toml)
    start, store = RunFolder(job.run_dir, run).start(), open_training_store(job.folder, run)
    own, name = run.model_copy(update={"patient_dp": None}), load_site(job.folder).name
    key = model_key(own, store, name, start)
    train = partial(train_alone, own, store, name, start=start)
    return kept_or_trained(job.folder, key, with_own_constants(own, store), store, train)


def personalise(job: AloneJob) -> PanModel:
    """Train the federated model further on a site's own images, and labels in a run with a task, with the federation's
    constants of inputs and the experts that the site has kept."""
    model, run = load_model(job.run_dir / "model")
    train = run.train.model_copy(update={"rounds": 1, "local_steps": _personal_steps(run)})
    streams = {name: stream.model_copy(update={"input_constants": None}) for name, stream in run.streams.items()}
    own = run.model_copy(update={"patient_dp": None, "site_dp": None, "train": train, "streams": streams})
    store = open_training_store(job.folder, run)
    name, kept = f"{load_site(job.folder).name}, personalised", _kept_parameters(job)
    return train_alone(own, store, name, start=model.state_dict(), kept=kept)


def _personal_steps(run: RunConfig) -> int:
    return run.task.personal_steps if run.task else run.probe.personal_steps


def _kept_parameters(job: AloneJob) -> dict[str, Tensor]:
    """Parameters that a site has kept to itself after the last round, by name; none if they are not in the run
    folder, as in a deployment."""
    for path in sorted((job.run_dir / "sites" / job.folder.name / RUNS).glob("*")):
        states = StateStore(path.parents[1], path.name)
        if last := states.round_before(parse_run(job.run_toml).train.rounds + 1):
            state = states.load(last)
            return {name.removeprefix(_STUDENT): value for name, value in state.items() if name.startswith(_STUDENT)}
    return {}


def _personalised(run: RunConfig, folders: Sequence[Path], run_dir: Path) -> dict[str, PanModel]:
    """Site -> its personalised model; none where the run asks for no personal steps."""
    if _personal_steps(run) == 0:
        return {}
    models = run_jobs(personalise, [AloneJob(dump_toml(run), folder, run_dir) for folder in folders])
    return {load_site(folder).name: model for folder, model in zip(folders, models, strict=True)}


@contextmanager
def sites_alone(run: RunConfig, cohort: Path, run_dir: Path) -> Iterator[Callable[[], list[PanModel]]]:
    """Train each site by itself in worker processes, while this process does other work.

    Yields:
        A function that waits for the models, and returns them in the order of the site folders; no models where the
        cohort has no held-out subjects, or no labels, to probe them on.
    """
    is_probed = _has_holdout(cohort) and read_cohort_labels(cohort).info
    folders = site_folders(cohort / "sites") if is_probed else []
    jobs = [AloneJob(dump_toml(run), folder, run_dir) for folder in folders]
    with background_jobs(train_site_alone, jobs) as models:
        yield models


def finish(
    run: RunConfig,
    cohort: Path,
    run_dir: Path,
    console: Console,
    alone: Callable[[], list[PanModel]] | None = None,
    *,
    began_cpu_s: float | None = None,
) -> None:
    """Probe the federation's model and its baselines if the cohort has held-out subjects with labels; print and write
    the report.

    Args:
        alone: Waits for the models of `sites_alone`; they are trained now when left out.
        began_cpu_s: Processor time of this process when the run began; None if other processes have trained.
    Raises:
        DataError: the cohort's label table or held-out folder does not hold.
    """
    if _has_holdout(cohort):
        opened = OpenedCohort.open(cohort, run)
        result = probe_run(run, cohort, run_dir, console, alone=alone, opened=opened) if opened.labels else None
        if result:
            write_result(run_dir / "probe.json", _labelled(privacy_label(run), result))
        write_report_data(run_dir, report_data(run, opened, run_dir, result, began_cpu_s))
    files = read_run(run_dir)
    if files.data.examples and tracking_of(run).images:
        log_images(RunFolder(run_dir, run), files.metadata["run-id"], png_files(files.data.examples))
    print_tables(files, console)
    console.print(f"report: {write_report(files)}")


def report_data(
    run: RunConfig, opened: OpenedCohort, run_dir: Path, result: ProbeResult | None, began_cpu_s: float | None
) -> ReportData:
    """Compute the parts of the report that need the cohort's images, and the processor time."""
    model = load_model(run_dir / "model")[0]
    cost = None
    if began_cpu_s is not None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        cost = Cost(round(time.process_time() - began_cpu_s, 1), gpu)
    scores = result.labels if result else ()
    aucs = {score.group: score.value for score in scores if (score.arm, score.metric) == ("federated", "auc")}
    best = sorted((label for label, auc in aucs.items() if math.isfinite(auc)), key=aucs.__getitem__, reverse=True)
    return ReportData(
        embedding_map(run, model, opened, best),
        example_slices(run, model, opened),
        expert_map(run, RunFolder(run_dir, run), model, opened),
        cost,
    )


def _has_holdout(cohort: Path) -> bool:
    return (cohort / "holdout" / "site.toml").is_file()


def _labelled(label: str, result: ProbeResult) -> ProbeResult:
    """The result with a note of the run's privacy."""
    return result if label == "none" else replace(result, notes=(*result.notes, f"privacy: {label}"))


def probe_run(
    run: RunConfig,
    cohort: Path,
    run_dir: Path,
    console: Console,
    *,
    alone: Callable[[], list[PanModel]] | None = None,
    opened: OpenedCohort | None = None,
    with_all_grids: bool = False,
) -> ProbeResult:
    """Probe `federated`, `site:<name>` alone, `untrained`, `start` in a warm start, and the references.

    Args:
        alone: Waits for the models of `sites_alone`; they are trained now when left out.
        opened: Images and labels of the cohort; they are opened now when left out.
        with_all_grids: Take organs away for every arm, instead of for the federated model and the references.
    """
    folders = site_folders(cohort / "sites")
    console.print(f"training each of {len(folders)} sites alone, for comparison; models of an equal run are used again")
    if alone is None:
        site_models = run_jobs(train_site_alone, [AloneJob(dump_toml(run), folder, run_dir) for folder in folders])
    else:
        site_models = alone()
    models = {"federated": load_model(run_dir / "model", whitened=False)[0]}
    models |= {f"site:{load_site(folder).name}": model for folder, model in zip(folders, site_models, strict=True)}
    models["untrained"] = build_model(run)
    if start := RunFolder(run_dir, run).start():
        models["start"] = build_model(run)
        load_with_fresh_private(models["start"], run.sharing, start, models["start"].state_dict())
    opened = opened or OpenedCohort.open(cohort, run)
    if not opened.labels:
        raise DataError(
            f"{cohort}: no label to probe, expected a label table at the sites and of the held-out subjects"
        )
    with Progress(console=console) as bar:
        shown = bar.add_task("probing")

        def show(arm: str, number: int, total: int) -> None:
            bar.update(shown, description=f"probing {arm}", completed=number, total=total)

        grid_arms = (*_GRID_ARMS, *models) if with_all_grids else _GRID_ARMS
        result = evaluate_cohort(opened.task(run), models, grid_arms=grid_arms, on_arm=show)
        bar.update(shown, description="probing", completed=bar.tasks[shown].total)
    shown_models = {arm: model for arm, model in models.items() if not arm.startswith("site:")}
    leaked = leakage(opened.task(run), shown_models)
    if whitening := models["federated"].whitening:
        save_whitening(run_dir / "model", whitening, run.features.pooling_text)
    personalised = _personalised(run, folders, run_dir)
    task_scores = score_task(run, models, personalised, cohort) if run.task else ()
    probes = read_probes(run_dir / "model")
    together = probe_sites(opened.task(run), load_model(run_dir / "model", whitened=False)[0], probes)
    notes = result.notes + together.notes
    benefits: tuple[Score, ...] = ()
    if run.task is None and (size := models["federated"].embedding_size) > MOST_FEATURES:
        notes += (f"what a site should keep is not told: embeddings of {size} numbers, expected {MOST_FEATURES}",)
    elif run.task is None:
        benefits = site_benefits(opened.task(run), models, personalised)
    scores = result.scores + together.scores
    return replace(result, scores=scores, notes=notes, task=task_scores, leakage=leaked, benefit=benefits)
