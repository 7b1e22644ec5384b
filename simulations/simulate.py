"""One simulated federation, from a run description to its report."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from panfm.config import RunConfig, load_run, site_folders, without_summed_constants
from panfm.config.differences import check_same_run
from panfm.errors import ConfigError, RunError
from panfm.outputs import write_json
from panfm.texts import parse_json, read_text
from server.run_folder import RunFolder, default_path
from simulations.cohorts.leaks import check_cohort
from simulations.cohorts.prepare import cohort_folder, load_simulation, prepare_cohort, public_weights
from simulations.cohorts.shared_labels import with_shared_labels
from simulations.engines.job import Job, run_job
from simulations.extension import extend
from simulations.finish import finish, sites_alone
from simulations.preflight import check_before, check_disk
from simulations.site_errors import SiteErrors

_COMMAND = "command.json"
"""The overrides that a run was started with, in its folder."""
_DATA = "data.json"
"""File with hashes of the images and labels of each site folder that a run was started with."""
_REMEDIES = {
    "images": "start a new run",
    "labels": "start a new run (`panfm probe RUN SITE...` tries a finished model on other labels)",
}


def simulate(
    experiment: Path | None,
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
    resume: Path | None = None,
    rounds: int | None = None,
    engine: str = "local",
    console: Console | None = None,
) -> Path:
    """Make the cohort if it is not there, check it, run the federation, probe and report.

    Args:
        experiment: The run description. Under `resume` it must be the one that the run began with, or None.
        overrides: `key=value`, not under `resume`.
        out: Run folder; `runs/<name>-<time>` when left out.
        resume: Run folder to go on with, instead of `out`.
        rounds: Under `resume`, rounds of the whole run from now on.
        engine: local, ray, flower or deployment.
    Returns:
        The run folder.
    Raises:
        PanfmError: the run did not do what was asked; the line says why.
    """
    console = console or Console(soft_wrap=True, highlight=False, markup=False)
    began_cpu_s = time.process_time()
    if resume:
        folder = _resume(resume, experiment, overrides, out)
        cohort = _checked_cohort(folder.run, console)
        _check_same_data(folder, _own_data(folder.run, cohort))
        if rounds is not None:
            folder = extend(folder, rounds)
            _keep_overrides(resume, [*_overrides(resume), f"train.rounds={rounds}"])
    else:
        run = load_simulation(_required(experiment), overrides, weights=public_weights())
        path = out or default_path(run.name)
        RunFolder.check_new(path, run)
        cohort_folder(run)
        cohort = _checked_cohort(run, console)
        check_disk(run, path, len(site_folders(cohort / "sites")))
        data = _own_data(run, cohort)
        folder = RunFolder.create(path, with_shared_labels(run, cohort))
        _keep_overrides(path, overrides)
        if data:
            write_json(path / _DATA, data)
    job = Job(cohort / "sites", folder.path)
    if engine == "local":  # one process, which leaves the other cores to the sites' training alone
        with sites_alone(folder.run, cohort, folder.path) as alone:
            _run(job, engine, console)
            finish(_as_run(folder), cohort, folder.path, console, alone, began_cpu_s=began_cpu_s)
    else:
        _run(job, engine, console)
        finish(_as_run(folder), cohort, folder.path, console)
    console.print(f"run folder: {folder.path}")
    return folder.path


def _run(job: Job, engine: str, console: Console) -> None:
    """Run a federation, and print the errors of its sites in their own words. Raises RunError with them if it fails."""
    errors = SiteErrors(job.run_dir)
    try:
        run_job(job, engine)
    except RunError as error:
        new = [line for line in errors.lines() if line not in str(error)]
        raise RunError("\n".join([str(error), *new])) from error
    for line in errors.lines():
        console.print(line, markup=False)


def _as_run(folder: RunFolder) -> RunConfig:
    """The description of a run that has ended, with what the server has filled in."""
    return load_run(folder.path / "run.toml")


def _required(experiment: Path | None) -> Path:
    if experiment is None:
        raise ConfigError("expected a run description (TOML), or --resume with a run folder")
    return experiment


def _checked_cohort(run: RunConfig, console: Console) -> Path:
    """The folder of a run's cohort, after all that can be checked before the first round; prints what is left out."""
    cohort = prepare_cohort(run, console)
    for line in check_before(run, cohort):
        console.print(line, markup=False)
    return cohort


def _resume(path: Path, experiment: Path | None, overrides: Sequence[str], out: Path | None) -> RunFolder:
    if overrides:
        raise ConfigError("--set does not go with --resume: a run goes on as it was described")
    if out:
        raise ConfigError("--out does not go with --resume: a run goes on in its own folder")
    folder = RunFolder.resume(path)
    if experiment and (path / _COMMAND).exists():
        given = load_simulation(experiment, _overrides(path), weights=public_weights())
        if not given.probe.tasks:  # filled in from the cohort's labels
            given = given.model_copy(update={"probe": given.probe.model_copy(update={"tasks": folder.run.probe.tasks})})
        check_same_run(experiment, without_summed_constants(given), without_summed_constants(folder.run))
    return folder


def _own_data(run: RunConfig, cohort: Path) -> dict[str, dict[str, str]]:
    """Check the user's own site folders for leaks, and hash their images and labels; empty for a generated cohort."""
    return check_cohort(cohort, run) if run.cohort and run.cohort["kind"] == "folder" else {}


def _check_same_data(folder: RunFolder, data: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ConfigError if images or labels are not those that a run began with."""
    path = folder.path / _DATA
    began = parse_json(read_text(path), str(path)) if path.exists() else data  # runs of earlier versions lack it
    for place in {**began, **data}:
        for part, remedy in _REMEDIES.items():
            if data.get(place, {}).get(part) != began.get(place, {}).get(part):
                given = f"{part} of {place} differ from those that the run began with"
                raise ConfigError(f"{folder.path}: {given}; put them back, or {remedy}")


def _keep_overrides(folder: Path, overrides: Sequence[str]) -> None:
    write_json(folder / _COMMAND, {"overrides": list(overrides)})


def _overrides(folder: Path) -> list[str]:
    """The overrides that a run was started with, and how it was extended; none of a run of an earlier version."""
    path = folder / _COMMAND
    return list(parse_json(read_text(path), str(path))["overrides"]) if path.exists() else []
