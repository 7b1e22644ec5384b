"""One simulated federation, from a run description to its report."""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import assert_never

from rich.console import Console
from rich.progress import Progress

from panfm.config import RunConfig, site_folders
from panfm.config.cohort import (
    FolderCohortConfig,
    ModalitiesCohortConfig,
    PhantomCohortConfig,
    RealImagesCohortConfig,
    RealModalitiesCohortConfig,
)
from panfm.data import modalities, phantom
from panfm.data.modalities import write_modalities
from panfm.data.phantom.cohort import write_cohort
from panfm.errors import ConfigError, DataError
from panfm.privacy.guarantees import load_checked_run
from server.run_folder import RunFolder
from simulations import real_images, real_modalities
from simulations.engines import Job, run_job
from simulations.finish import finish
from simulations.real_images import write_real_cohort
from simulations.real_modalities import write_real_modalities

COHORTS = Path("cohorts")
"""Where cohorts are kept, so that a second run finds them."""


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
    run_job(Job(cohort / "sites", folder.path), engine)
    finish(folder.run, cohort, folder.path, console)
    console.print(f"run folder: {folder.path}")
    return folder.path


def _create(experiment: Path, overrides: Sequence[str], out: Path | None) -> RunFolder:
    run = load_checked_run(experiment, overrides)
    cohort_folder(run)
    return RunFolder.create(out or Path(f"runs/{run.name}-{time.strftime('%Y%m%d-%H%M%S')}"), run)


def _resume(folder: Path, overrides: Sequence[str], out: Path | None) -> RunFolder:
    if overrides:
        raise ConfigError("--set does not go with --resume: a run goes on as it was described")
    if out:
        raise ConfigError("--out does not go with --resume: a run goes on in its own folder")
    return RunFolder.resume(folder)


def prepare_cohort(run: RunConfig, console: Console) -> Path:
    """The cohort folder that a run asks for; made on first use.

    Raises:
        ConfigError: the run names no cohort, or one that is not there.
        DataError: the cohort cannot be made.
    """
    folder = cohort_folder(run)
    if isinstance(run.cohort, FolderCohortConfig):
        return folder
    if folder.exists():
        console.print(f"cohort: {folder} (made before)")
        return folder
    try:
        _make_cohort(folder, run, console)
    except DataError:
        if not folder.exists():  # else another process has made it meanwhile
            raise
    return folder


def _make_cohort(folder: Path, run: RunConfig, console: Console) -> None:
    with Progress(console=console) as bar:
        task = bar.add_task(f"cohort: making {folder}")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        match run.cohort:
            case PhantomCohortConfig():
                write_cohort(folder, run.cohort, run.streams, show)
            case ModalitiesCohortConfig():
                write_modalities(folder, run.cohort, run.streams, show)
            case RealImagesCohortConfig():
                write_real_cohort(folder, run.cohort, run.streams, show)
            case RealModalitiesCohortConfig():
                write_real_modalities(folder, run.cohort, run.streams, show)
            case FolderCohortConfig() | None:
                raise ConfigError(f"{run.name}: cohort is not one that is made")
            case _:
                assert_never(run.cohort)


def cohort_folder(run: RunConfig) -> Path:
    """Where a run's cohort lies, or will be made: under a name that its content decides. Raises ConfigError as above.

    The content: its description, the streams, the code that makes it, and the scans that it is made of.
    """
    config = run.cohort
    if config is None:
        raise ConfigError(f"{run.name}: cohort is missing, a simulation takes its sites from it")
    if isinstance(config, FolderCohortConfig):
        site_folders(Path(config.path) / "sites")
        return Path(config.path)
    words: list[object] = [
        config.model_dump(mode="json"),
        [(name, each.model_dump(mode="json")) for name, each in run.streams.items()],
    ]
    match config:
        case PhantomCohortConfig():
            words += _texts(sorted(Path(phantom.__file__).parent.glob("*.py")))
        case ModalitiesCohortConfig():
            words += _texts(sorted(Path(modalities.__file__).parent.glob("*.py")))
        case RealImagesCohortConfig():
            words += _texts([Path(real_images.__file__)]) + _listing(real_images.real_data(), "*.nii.gz")
        case RealModalitiesCohortConfig():
            words += _texts([Path(real_modalities.__file__)])
            words += _listing(real_images.real_data(real_modalities.FOLDER) / real_modalities.FOLDER, "*")
        case _:
            assert_never(config)
    return COHORTS / f"{config.kind}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]}"


def _texts(paths: Iterable[Path]) -> list[object]:
    return [path.read_text(encoding="utf-8") for path in paths]


def _listing(folder: Path, pattern: str) -> list[object]:
    """Every image under a folder, with size and time of its last change."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
