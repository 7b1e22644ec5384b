"""`panfm site init` and `panfm split`: site folders made from images that are there."""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, cast

import typer

from panfm.cli.command_parts import no_nan
from panfm.errors import ConfigError, DataError, one_line

if TYPE_CHECKING:
    from panfm.data.image_names import NameRules
    from panfm.data.image_sources import LeftOut
    from panfm.data.manifest import Row
    from panfm.data.manifest_proposal import Proposal
    from panfm.data.partition import By

app = typer.Typer(no_args_is_help=True)
_BY = ("stream", "label", "size", "iid")
_SPLITS = ("train", "val", "test")
_MOST_NAMED = 10
"""Files that are named for one reason, and lines on what is unclear; further ones are counted."""


@app.callback()
def _data() -> None:
    """Keep `split` a command of a group, alone as it is."""


@app.command()
def split(
    folder: Annotated[Path, typer.Argument(help="Site folder with the pooled images.")],
    out: Annotated[Path, typer.Option(help="New folder for sites/ and holdout/.")],
    sites: Annotated[int, typer.Option(min=1, max=1000, help="Number of sites.")] = 5,
    by: Annotated[str, typer.Option(help="stream, label, size or iid.")] = "iid",
    label: Annotated[str | None, typer.Option(help="With --by label: column of labels.csv, e.g. a scanner.")] = None,
    alpha: Annotated[
        float,
        typer.Option(
            min=0.001, max=1e6, callback=no_nan, help="Of the Dirichlet distribution: small for sites that differ."
        ),
    ] = 0.3,
    holdout: Annotated[
        float, typer.Option(min=0.0, max=0.9, callback=no_nan, help="Share of subjects that no site gets.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same split.")] = 0,
) -> None:
    """Part one pooled site folder into simulated sites and a hold-out; every patient goes to one place, whole.

    iid deals out equal parts, size unequal ones; label and stream deal out the patients of each class, or of each set
    of streams, unequally. Images stay where they are; the folder is a cohort for simulations.
    """
    if by not in _BY:
        raise ConfigError(f"--by: found {by!r:.40}, expected one of {', '.join(_BY)}")
    if (by == "label") != (label is not None):
        raise ConfigError("--label: names the column of --by label, expected both or neither")
    from panfm.data.partition import PooledSite, draw_places, write_places

    if out.exists():
        raise DataError(f"{out}: exists already, expected a new folder")
    way, pooled = cast("By", by), PooledSite.open(folder)
    places = draw_places(pooled, way, sites=sites, holdout=holdout, alpha=alpha, seed=seed, label=label)
    write_places(pooled, places, out)
    _print_places(places, pooled.rows, pooled.kinds(way, label) if label else None)
    typer.echo(f'{out}: {len(places)} folders; for a run: [cohort] kind = "folder", path = "{out}"')


def init_empty(folder: Path, name: str | None) -> None:
    """Write a site folder to fill in; the name is asked for when None."""
    from panfm.data.template import init_site

    init_site(folder, typer.prompt("Stable name of the site") if name is None else name)
    typer.echo(f"{folder}: fill in manifest.csv, then run: panfm site check {quote(str(folder))}")


def init_from(
    folder: Path, name: str | None, source: Path, *, streams: Sequence[str], subject: str | None, split: str, yes: bool
) -> None:
    """Propose the manifest of a site from a folder or table of images, show it, and write it if it is agreed to.

    Raises:
        ConfigError: an option does not hold.
        DataError: nothing is to be written, or something must be told apart first.
    """
    from panfm.config import load_site, parse_site
    from panfm.data.joins import counted
    from panfm.data.manifest_proposal import propose
    from panfm.data.source_labels import SourceLabels
    from panfm.data.template import add_rows, plain_name, read_rows, site_text

    rules = name_rules(streams, subject)
    if split and split not in _SPLITS:
        raise ConfigError(f"--split: found {split!r:.40}, expected one of {', '.join(_SPLITS)}")
    is_new = not (folder / "site.toml").exists()
    own_name = plain_name(folder.absolute().name) if name is None else name
    has_labels = (folder / "labels.csv").is_file()
    if is_new and not own_name:
        raise ConfigError(f"--name: needed, as {str(folder)!r} has no letter of a to z, e.g. --name north")
    text = site_text(own_name) if is_new else ""
    site = parse_site(text) if is_new else load_site(folder)
    if name is not None and name != site.name:
        raise ConfigError(f"--name: found {name!r:.80}, expected {site.name}, as site.toml has it")
    proposal = propose(source, rules, folder, site, read_rows(folder, site), split=split)
    rows = (*proposal.kept, *proposal.added)
    labels = SourceLabels.find(source, folder, (row.subject for row in rows), is_new=is_new)
    show(proposal, site.name)
    for line in (*labels.lines, *(f"note: {note}" for note in proposal.notes)):
        typer.echo(one_line(line, limit=1000))
    _require_clear(proposal, source)
    written = counted(len(proposal.added), "row")
    if not yes and not (_can_ask() and typer.confirm(f"Write {written} to {folder}?")):
        raise DataError("nothing is written; give --yes to write it")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_new:
            labels.copy_to(folder)
            text = site_text(own_name, has_labels=has_labels or bool(labels.files))
            (folder / "site.toml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror}), expected a folder") from error
    add_rows(folder, site, proposal.added)
    typer.echo(f"{folder}: {written} written; now run: panfm site check {quote(str(folder))}")


def _require_clear(proposal: "Proposal", source: Path) -> None:
    """Raises DataError: something must be told apart first, or there is nothing to write."""
    if proposal.unclear:
        lines = [one_line(line, limit=1000) for line in proposal.unclear[:_MOST_NAMED]]
        lines += [f"and {more} more such lines"] if (more := len(proposal.unclear) - _MOST_NAMED) > 0 else []
        raise DataError("\n".join([*lines, "nothing is written until these are told apart"]))
    if not proposal.added:
        raise DataError(f"{source}: found no new image, expected some that the manifest lacks (see what is left out)")


def _can_ask() -> bool:
    """Whether somebody sits at the terminal."""
    return sys.stdin.isatty()


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
        examples.append(one_line(f"{stream}: e.g. subject {own[-1].subject!r}, {own[-1].path}", limit=1000))
    table.add_section()
    table.add_row("any", *_numbers(rows), str(len(proposal.added)), *_splits(rows))
    Console(markup=False).print(table)
    for line in (*examples, *_several_modalities(rows), *left_out_lines(proposal.left_out)):
        typer.echo(line)


def _several_modalities(rows: Sequence["Row"]) -> list[str]:
    """One line on subjects with images of several modalities, who may be different people of one number; else none."""
    from panfm.anatomy import parse_stream
    from panfm.data.joins import counted

    modalities: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        modalities[row.subject].add(parse_stream(row.stream)[1].value)
    several = {subject: names for subject, names in modalities.items() if len(names) > 1}
    if not several:
        return []
    subject, names = next(iter(several.items()))
    told = f"{counted(len(several), 'subject')} with images of several modalities, e.g. {subject!r} with"
    remedy = "if they are different people, --subject 'EXPRESSION' tells them apart"
    return [one_line(f"{told} {' and '.join(sorted(names))}: each taken for one person; {remedy}", limit=1000)]


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
        lines.append(one_line(f"left out, {reason}: {len(paths)}: {', '.join(paths[:_MOST_NAMED])}{more}", limit=1000))
    return lines


def _print_places(
    places: Mapping[str, Sequence[str]], rows: Sequence["Row"], classes: Mapping[str, str] | None
) -> None:
    """Print who got what: subjects by split, by stream, and by class where sites were drawn by a label."""
    from rich.console import Console
    from rich.table import Table

    streams = sorted({row.stream for row in rows})
    values = sorted(set(classes.values())) if classes else []
    table = Table("site", "subjects", "train", "val", *streams, *(value or "(unknown)" for value in values))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, subjects in places.items():
        names = set(subjects)
        own = [row for row in rows if row.subject in names]
        of_split = _splits(own)[:2] if name != "holdout" else ["-", "-"]
        holders = [str(len({row.subject for row in own if row.stream == stream})) for stream in streams]
        of_class = [str(sum(classes[subject] == value for subject in subjects)) for value in values] if classes else []
        table.add_row(name, str(len(subjects)), *of_split, *holders, *of_class)
    Console(markup=False).print(table)
