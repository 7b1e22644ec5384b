"""One simulated federation, from a run description to its report."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from panfm.config import RunConfig, dump_toml, load_run
from panfm.config.run import FolderCohortConfig, PhantomCohortConfig
from panfm.data import phantom
from panfm.data.phantom.cohort import write_cohort
from panfm.errors import ConfigError, RunError
from panfm.files import write_atomic
from simulations.engines import Job, run_job
from simulations.finish import finish
from simulations.real_images import write_real_cohort

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
        engine: local, ray or flower.
    Returns:
        The run folder.
    Raises:
        PanfmError: the run did not do what was asked; the line says why.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    if resume:
        run_dir, run = resume, load_run(resume / "run.toml")
        if overrides:
            raise ConfigError("--set does not go with --resume: a run goes on as it was described")
    else:
        run = load_run(experiment, overrides)
        run_dir = out or Path(f"runs/{run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if (run_dir / "checkpoint").exists():
            raise RunError(f"{run_dir}: holds a run already; --resume it or choose another --out")
        write_atomic(run_dir / "run.toml", dump_toml(run).encode())
    cohort = prepare_cohort(run, console)
    run_job(Job(cohort / "sites", run_dir, resume=resume is not None), engine)
    finish(run, cohort, run_dir, console)
    console.print(f"run folder: {run_dir}")
    return run_dir


def prepare_cohort(run: RunConfig, console: Console) -> Path:
    """The cohort folder that a run asks for; made on first use, under a name that its content decides.

    Raises:
        ConfigError: the run names no cohort.
        DataError: the cohort cannot be made.
    """
    config = run.cohort
    if config is None:
        raise ConfigError(f"{run.name}: cohort is missing, a simulation takes its sites from it")
    if isinstance(config, FolderCohortConfig):
        return Path(config.path)
    folder = COHORTS / f"{config.kind}-{_cohort_key(run)}"
    if folder.exists():
        console.print(f"cohort: {folder} (made before)")
        return folder
    COHORTS.mkdir(exist_ok=True)
    with Progress(console=console) as bar:
        task = bar.add_task(f"cohort: making {folder}")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if isinstance(config, PhantomCohortConfig):
            write_cohort(folder, config, run.streams, show)
        else:
            write_real_cohort(folder, config, run.streams, show)
    return folder


def _cohort_key(run: RunConfig) -> str:
    """Hash of all that decides a cohort's files: its description, the streams, the code that draws it."""
    assert run.cohort is not None
    words = {
        "cohort": run.cohort.model_dump(mode="json"),
        "streams": {name: stream.model_dump(mode="json") for name, stream in run.streams.items()},
        "code": [path.read_text(encoding="utf-8") for path in sorted(Path(phantom.__file__).parent.glob("*.py"))],
        "real": os.environ.get("PANFM_REAL_DATA", ""),
    }
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:12]
