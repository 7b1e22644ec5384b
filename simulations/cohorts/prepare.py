"""From the `[cohort]` table of a run to a folder of sites: checked when the description is read, made on first use.

`panfm` takes the table as it is, since a hospital's part of a run has no cohort.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panfm.config import RunConfig, dump_toml, parse_table, site_folders
from panfm.config.run_file import read_description, run_of_table
from panfm.errors import ConfigError, DataError
from panfm.privacy.guarantees import checked_run
from panfm.texts import check_text
from simulations.cohorts import COHORTS
from simulations.cohorts.auto_streams import with_streams
from simulations.cohorts.cohort_source import CohortSource, Streams

if TYPE_CHECKING:
    from rich.console import Console

WEIGHTS = "PANFM_WEIGHTS"
"""Environment variable that names a file of public weights."""
FOLDER = Path("cohorts")
"""Where cohorts are kept, so that a second run finds them."""
_LAYOUT = 5
"""To be raised whenever site folders are written otherwise (site_folder.py)."""


def load_simulation(path: Path, overrides: Iterable[str] = (), *, weights: str | None = None) -> RunConfig:
    """Read a run description as `load_checked_run` does; streams of `size = "auto"` get their shapes from the sites'
    images; its cohort, if it has one, is checked and its defaults are filled in.

    Args:
        weights: Public weights that a run starts from if its cohort says with which changes, `cohort.with-weights`.
    Raises:
        ConfigError: as `load_checked_run`, or the cohort does not hold or does not go with the run's streams.
    """
    given = list(overrides)
    run = _checked(path, given)
    if weights and run.start is None and (changes := (run.cohort or {}).get("with-weights")):
        run = _checked(path, [*changes, f"start.model={weights}", *given])
    if run.cohort is not None:
        run = with_cohort(run, cohort_of(run, str(path)))
        check_text(dump_toml(run), f"{path}: with all defaults")
    return run


def _checked(path: Path, overrides: Sequence[str]) -> RunConfig:
    table = read_description(path, overrides)
    return checked_run(run_of_table(with_streams(table, str(path)), str(path)), str(path))


def public_weights() -> str | None:
    """Path of the public weights that the environment names; None if it names none."""
    return os.environ.get(WEIGHTS) or None


def with_cohort(run: RunConfig, cohort: CohortSource) -> RunConfig:
    """A run with another cohort."""
    return run.model_copy(update={"cohort": cohort.table()})


def cohort_of(run: RunConfig, where: str | None = None) -> CohortSource:
    """The cohort that a run describes. Raises ConfigError, beginning with `where` or the run's name: it has none, or
    one that does not hold."""
    where = where or run.name
    if run.cohort is None:
        raise ConfigError(f"{where}: cohort is missing, a simulation takes its sites from it")
    cohort: CohortSource = parse_table(_class_of(run.cohort, where), run.cohort, where, key="cohort")
    try:
        cohort.check(run.streams)
    except ConfigError as error:
        raise ConfigError(f"{where}: cohort: {error}") from None
    return cohort


def prepare_cohort(run: RunConfig, console: "Console") -> Path:
    """The cohort folder that a run asks for; made on first use.

    Raises:
        ConfigError: the run names no cohort, or one that is not there.
        DataError: the cohort cannot be made.
    """
    cohort = cohort_of(run)
    folder = _folder_of(cohort, run.streams)
    if cohort.existing:
        return folder
    if folder.exists():
        console.print(f"cohort: {folder} (made before)")
        return folder
    try:
        write_cohort(cohort, folder, run.streams, console)
    except DataError:
        if not folder.exists():  # else another process has made it meanwhile
            raise
    return folder


def write_cohort(cohort: CohortSource, folder: Path, streams: Streams, console: "Console") -> None:
    """Write a cohort and show how far it is. Raises as `CohortSource.write`."""
    from rich.progress import Progress

    with Progress(console=console) as bar:
        task = bar.add_task(f"cohort: making {folder}")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        cohort.write(folder, streams, show)


def cohort_folder(run: RunConfig) -> Path:
    """Where a run's cohort lies, or will be made: under a name that its description, the streams and its fingerprint
    decide. Raises ConfigError as `prepare_cohort` does."""
    return _folder_of(cohort_of(run), run.streams)


def _folder_of(cohort: CohortSource, streams: Streams) -> Path:
    if cohort.existing:
        site_folders(cohort.existing / "sites")
        return cohort.existing
    described = [(name, stream.model_dump(mode="json")) for name, stream in streams.items()]
    table = cohort.table()
    content = json.dumps([table, described, cohort.fingerprint(), _LAYOUT])
    return FOLDER / f"{table['kind']}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _class_of(table: dict[str, Any], where: str) -> type[CohortSource]:
    kind = table.get("kind")
    if not isinstance(kind, str):
        given = "nothing" if kind is None else f"{kind!r:.80}"
        raise ConfigError(f"{where}: {COHORTS.key}: found {given}, expected one of {', '.join(COHORTS.names)}")
    try:
        loaded: type[CohortSource] = COHORTS.load(kind)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return loaded
