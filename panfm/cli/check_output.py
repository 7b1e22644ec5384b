"""`panfm site check`: checks folders, compares them, and prints what was found."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from panfm.cli.command_parts import progress_bar
from panfm.config import StreamConfig, load_site, site_path
from panfm.data.check import SiteReport, check_site
from panfm.data.check_places import Place, empty_split, label_lines, leaks, same_names
from panfm.data.joins import counted, named
from panfm.data.left_out import read_quarantine
from panfm.data.manifest import QUARANTINE, SPLITS
from panfm.data.quarantine import write_quarantine
from panfm.errors import ConfigError, DataError, NoSubjectsError


def check_folders(
    sites: Sequence[Path],
    holdout: Path | None,
    streams: Mapping[str, StreamConfig] | None,
    organs: Collection[str] | None,
    *,
    quarantine: bool = False,
) -> bool:
    """Check sites and their hold-out, each by itself and beside the others, and print the result.

    Args:
        quarantine: Whether to list faulty rows in each folder, instead of failing for them.
    Returns:
        Whether all is sound, or faulty rows are listed.
    Raises:
        ConfigError: a `site.toml` does not hold, or two folders have one name.
        DataError: a label table or quarantine does not hold, or nothing sound is left to quarantine rows from.
    """
    folders = [*sites, *([holdout] if holdout else [])]
    with progress_bar("reading images") as progress:
        reports = [check_site(folder, streams, organs=organs, progress=progress) for folder in folders]
    _refuse_equal_names(folders, reports)
    places = [
        Place.of_report(report, is_holdout=folder is holdout) for folder, report in zip(folders, reports, strict=True)
    ]
    shared, sound = leaks(places), True
    for folder, report in zip(folders, reports, strict=True):
        split = "test" if folder is holdout else "train"
        own = [*report.faults, *shared[report.site]]
        if empty := empty_split(report, split, streams):
            own.append(empty)
        condemned = {fault.row for fault in own}
        left = replace(report, faults=tuple(own), rows=tuple(row for row in report.rows if row not in condemned))
        _print_report(folder, left, several=len(folders) > 1)
        if quarantine:
            _quarantine(folder, left, split)
        elif listed := read_quarantine(folder / QUARANTINE):
            typer.echo(
                f"quarantine.csv: {len(listed)} rows are left out of every run; --quarantine writes the list anew"
            )
        sound = sound and not own
    for line in same_names(places):
        typer.echo(f"note: {line}")
    return sound or quarantine


def _refuse_equal_names(folders: Sequence[Path], reports: Sequence[SiteReport]) -> None:
    named_by: dict[str, Path] = {}
    for folder, report in zip(folders, reports, strict=True):
        if (first := named_by.setdefault(report.site, folder)) is not folder:
            raise ConfigError(f"{folder}: found the name {report.site!r}, which {first} has, expected another")


def _print_report(folder: Path, report: SiteReport, *, several: bool) -> None:
    _print_coverage(report)
    prefix = f"{report.site}: " if several else ""
    for fault in report.faults:
        typer.echo(f"{prefix}{fault}")
    files: dict[str, list[str]] = {}
    for path, note in report.notes:
        files.setdefault(note, []).append(path)
    for note, paths in files.items():
        typer.echo(f"note: {prefix}{named(paths)}: {note}")
    labels = load_site(folder).labels
    if labels and not site_path(folder, labels).exists():
        typer.echo(f"note: {prefix}{labels}: no such file, nothing can be probed")
    else:
        for line in label_lines(folder, report):
            typer.echo(f"note: {prefix}{line}")


def _quarantine(folder: Path, report: SiteReport, split: str) -> None:
    if not report.rows:
        raise DataError(f"{folder}: found no sound row, expected at least one")
    if not any(row.split == split for row in report.rows):
        raise NoSubjectsError.of(str(folder), split, sorted({row.stream for row in report.rows}))
    path = write_quarantine(folder, report.faults)
    typer.echo(f"{path}: {counted(len(report.faults), 'row')} left out, {len(report.rows)} stay")


def _print_coverage(report: SiteReport) -> None:
    table = Table("stream", *SPLITS, title=f"{report.site}: subjects")
    for column in table.columns[1:]:
        column.justify = "right"
    for stream in sorted({row.stream for row in report.rows}):
        note = " (not in this run)" if stream in report.unused else ""
        table.add_row(stream + note, *(str(report.coverage[stream, split]) for split in SPLITS))
    table.add_section()
    subjects = {(row.subject, row.split) for row in report.rows}
    table.add_row("any", *(str(sum(split == own for _, own in subjects)) for split in SPLITS))
    Console(markup=False).print(table)
