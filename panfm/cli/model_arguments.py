"""Arguments of commands that need a trained model and images: RUN, and site folders."""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from panfm.cli.command_parts import progress_bar
from panfm.evaluate.model_folder import model_folder

if TYPE_CHECKING:
    from panfm.config import StreamConfig
    from panfm.data.store import ImageStore

Model = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or folder of a model.", callback=model_folder)]


def open_stores(
    sites: Sequence[Path], streams: Mapping[str, "StreamConfig"], *, split: str | None = None
) -> list["ImageStore"]:
    """The images of site folders for a run's streams, read under a progress bar; what is left out is told.

    Raises:
        NoSubjectsError: a site has nobody in `split`, if that is given.
        DataError: as `open_store`.
    """
    from panfm.data.cache import open_store

    with progress_bar("reading images") as progress:
        stores = [open_store(site, streams, progress=lambda _, done, total: progress(done, total)) for site in sites]
    for site, store in zip(sites, stores, strict=True):
        if split:
            store.members(split, str(site))
    tell_left_out(sites, streams)
    return stores


def tell_left_out(sites: Sequence[Path], streams: Container[str]) -> None:
    """Print how many images of site folders a model leaves out: of streams that it does not have, and quarantined.

    Raises:
        ConfigError, DataError: `site.toml`, the manifest or the quarantine of a site does not hold.
    """
    from panfm.config import load_site
    from panfm.data.joins import counted
    from panfm.data.left_out import read_quarantine
    from panfm.data.manifest import QUARANTINE, read_manifest

    for site in sites:
        counts = Counter(row.stream for row in read_manifest(site, load_site(site)) if row.stream not in streams)
        for stream, count in counts.items():
            typer.echo(f"{site}: {counted(count, 'image')} of {stream} left out, the model has no such stream")
        if listed := len(read_quarantine(site / QUARANTINE)):
            typer.echo(f"{site}: {counted(listed, 'image')} left out by {QUARANTINE}")


def check_model(folder: Path) -> None:
    """Tell a mistake in the description of a model folder before torch is imported. Raises ConfigError."""
    from panfm.config import load_run

    load_run(folder / "run.toml")
