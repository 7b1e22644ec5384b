"""One screen of a run for a terminal. Words that come from sites are shown as they are: no markup, no escape codes."""

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from panfm.errors import one_line
from panfm.report.run_files import Run
from panfm.report.status import headline, left_out, privacy_line, site_statuses, stream_statuses

_MOST_LEFT_OUT = 6


def screen(run: Run) -> RenderableType:
    """How far it is, sites, streams, and who was left out."""
    parts: list[RenderableType] = [
        _text(f"{run.config.name}: {headline(run)}", style="bold"),
        _site_table(run),
        _stream_table(run),
    ]
    if privacy := privacy_line(run):
        parts.append(_text(privacy))
    for site, rounds, reason in left_out(run, _MOST_LEFT_OUT):
        parts.append(_text(f"{rounds}: {site} {reason}" if site else f"{rounds}: {reason}", style="yellow"))
    return Group(*parts)


def _site_table(run: Run) -> Table:
    statuses = site_statuses(run)
    is_private = any(each.epsilon is not None for each in statuses)
    table = Table("site", *map(_right, ("subjects", "rounds", "seconds", "loss", *(["epsilon"] if is_private else []))))
    table.add_column("last round", ratio=1)
    for each in statuses:
        numbers = [
            "-" if each.subjects is None else str(each.subjects),
            f"{each.answered}/{each.asked}",
            _number(each.seconds, 1),
            _number(each.loss, 4),
            *([_number(each.epsilon, 3)] if is_private else []),
        ]
        table.add_row(_text(each.site), *numbers, _text(each.now))
    return table


def _stream_table(run: Run) -> Table:
    table = Table("stream", *map(_right, ("held by", "trained by", "last round", "saliency")))
    for each in stream_statuses(run):
        table.add_row(
            _text(each.stream),
            str(len(each.holders)),
            str(len(each.trained_by)),
            "-" if each.last_round is None else str(each.last_round),
            _number(each.saliency, 2),
        )
    return table


def _text(words: str, style: str = "") -> Text:
    return Text(one_line(words), style=style)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _right(heading: str) -> Column:
    return Column(heading, justify="right", no_wrap=True)
