"""`panfm site init` and `panfm split`: site folders made from images that are there."""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from panfm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from panfm.data.image_names import NameRules
    from panfm.data.image_sources import LeftOut
    from panfm.data.manifest import Row
    from panfm.data.proposal import Proposal

app = typer.Typer(no_args_is_help=True)
_SPLITS = ("train", "val", "test")
_MOST_NAMED = 10
"""Files that are named for one reason; further ones are counted."""


def init_empty(folder: Path, name: str | None) -> None:
    """Write a site folder to fill in; the name is asked for when None."""
    from panfm.data.template import init_site

    init_site(folder, typer.prompt("Stable name of the site") if name is None else name)
    typer.echo(f"{folder}: fill in manifest.csv, then run: panfm site check {folder}")


def init_from(
    folder: Path, name: str | None, source: Path, *, streams: Sequence[str], subject: str | None, split: str, yes: bool
) -> None:
    """Propose the manifest of a site from a folder or table of images, show it, and write it if it is agreed to.

    Raises:
        ConfigError: an option does not hold.
        DataError: nothing is to be written, or something must be told apart first.
    """
    from panfm.config import load_site, parse_site
    from panfm.data.proposal import propose
    from panfm.data.template import add_rows, read_rows, site_text

    rules = name_rules(streams, subject)
    if split and split not in _SPLITS:
        raise ConfigError(f"--split: found {split!r:.40}, expected one of {', '.join(_SPLITS)}")
    is_new = not (folder / "site.toml").exists()
    text = site_text(folder.absolute().name if name is None else name) if is_new else ""
    site = parse_site(text) if is_new else load_site(folder)
    if name is not None and name != site.name:
        raise ConfigError(f"--name: found {name!r:.80}, expected {site.name}, as site.toml has it")
    proposal = propose(source, rules, folder, site, read_rows(folder, site), split=split)
    show(proposal, site.name)
    if proposal.unclear:
        raise DataError("\n".join([*proposal.unclear, "nothing is written until these are told apart"]))
    if not proposal.added:
        raise DataError(f"{source}: found no new image, expected some that the manifest lacks (see what is left out)")
    if not yes and not (sys.stdin.isatty() and typer.confirm(f"Write {len(proposal.added)} rows to {folder}?")):
        raise DataError("nothing is written; give --yes to write it")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_new:
            (folder / "site.toml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror}), expected a folder") from error
    add_rows(folder, site, proposal.added)
    typer.echo(f"{folder}: {len(proposal.added)} rows written; now run: panfm site check {folder}")


def name_rules(streams: Sequence[str], subject: str | None) -> "NameRules":
    """The options --stream and --subject. Raises ConfigError: one of them does not hold."""
    from panfm.anatomy import parse_stream
    from panfm.data.image_names import NameRules

    patterns = {}
    for option in streams:
        stream, equals, pattern = option.partition("=")
        if not equals or not pattern:
            raise ConfigError(f"--stream: found {option!r:.80}, expected STREAM='PATTERN', e.g. brain-mr='*T1w*'")
        try:
            parse_stream(stream)
        except ValueError as error:
            raise ConfigError(f"--stream: {error}") from error
        patterns[pattern] = stream
    try:
        return NameRules(patterns, re.compile(subject) if subject else None)
    except re.error as error:
        raise ConfigError(f"--subject: {subject!r:.80} is no regular expression ({error})") from error


def show(proposal: "Proposal", name: str) -> None:
    """Print the streams of a proposal as a table, then what is left out, by reason."""
    from rich.console import Console
    from rich.table import Table

    rows, examples = (*proposal.kept, *proposal.added), []
    table = Table("stream", "subjects", "sessions", "images", "new", *_SPLITS, title=name)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for stream in sorted({row.stream for row in rows}):
        own = [row for row in rows if row.stream == stream]
        is_new = sum(row.stream == stream for row in proposal.added)
        table.add_row(stream, *_numbers(own), str(is_new), *_splits(own))
        examples.append(f"{stream}: e.g. subject {own[-1].subject!r}, {own[-1].path}")
    table.add_section()
    table.add_row("any", *_numbers(rows), str(len(proposal.added)), *_splits(rows))
    Console().print(table)
    for line in (*examples, *left_out_lines(proposal.left_out)):
        typer.echo(line)


def _numbers(rows: Sequence["Row"]) -> tuple[str, str, str]:
    """Subjects, sessions and images."""
    subjects, visits = {row.subject for row in rows}, {(row.subject, row.session) for row in rows}
    return str(len(subjects)), str(len(visits)), str(len(rows))


def _splits(rows: Sequence["Row"]) -> list[str]:
    """Subjects of each split."""
    counts = Counter(split for _, split in {(row.subject, row.split) for row in rows})
    return [str(counts[split]) for split in _SPLITS]


def left_out_lines(left_out: Iterable["LeftOut"]) -> list[str]:
    """One line for each reason: how many, and their names."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for one in left_out:
        by_reason[one.reason].append(one.path)
    lines = []
    for reason, paths in by_reason.items():
        more = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
        lines.append(f"left out, {reason}: {len(paths)}: {', '.join(paths[:_MOST_NAMED])}{more}")
    return lines
