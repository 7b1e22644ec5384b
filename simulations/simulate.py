"""One simulated federation, from a run description to its report."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from panfm.errors import ConfigError
from server.run_folder import RunFolder, default_path
from simulations.cohorts.prepare import cohort_folder, load_simulation, prepare_cohort
from simulations.cohorts.shared_labels import with_shared_labels
from simulations.engines import Job, run_job
from simulations.finish import finish


def simulate(
    experiment: Path,
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
    resume: Path | None = None,
    engine: str = "local",
    console: Console | None = None,
) -> Path:
    """Make the cohort if it is not there, run the federation, probe and report.

    Args:
        experiment: The run description; under `resume`, only for its name: the run goes on as it was described.
        overrides: `key=value`, not under `resume`.
        out: Run folder; `runs/<name>-<time>` when left out.
        resume: Run folder to go on with, instead of `out`.
        engine: local, ray, flower or deployment.
    Returns:
        The run folder.
    Raises:
        PanfmError: the run did not do what was asked; the line says why.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    folder = _resume(resume, overrides, out) if resume else _create(experiment, overrides, out)
    cohort = prepare_cohort(folder.run, console)
    if not resume:
        folder = folder.redescribe(with_shared_labels(folder.run, cohort))
    run_job(Job(cohort / "sites", folder.path), engine)
    finish(folder.run, cohort, folder.path, console)
    console.print(f"run folder: {folder.path}")
    return folder.path


def _create(experiment: Path, overrides: Sequence[str], out: Path | None) -> RunFolder:
    run = load_simulation(experiment, overrides)
    cohort_folder(run)
    return RunFolder.create(out or default_path(run.name), run)


def _resume(folder: Path, overrides: Sequence[str], out: Path | None) -> RunFolder:
    if overrides:
        raise ConfigError("--set does not go with --resume: a run goes on as it was described")
    if out:
        raise ConfigError("--out does not go with --resume: a run goes on in its own folder")
    return RunFolder.resume(folder)
