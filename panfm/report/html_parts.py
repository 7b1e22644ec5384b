"""Parts of status.html: style, sections, tables, and charts with a legend. All text is escaped."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from panfm.report.charts import COLOURS, Line, Points, line_chart

STYLE = (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")

Rows = Iterable[Sequence[str]]


def section(title: str, body: str) -> str:
    """A heading above a piece of HTML; empty if the piece is empty."""
    return f"<h2>{html.escape(title)}</h2>{body}" if body else ""


def table(headings: Sequence[str], rows: Rows) -> str:
    """A table of plain words."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(headings, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def chart(lines: Mapping[str, Points], *, y: str) -> str:
    """A chart of numbers by round, with a legend; empty if there is no finite number."""
    styles = {name: f"c{number % COLOURS}" for number, name in enumerate(lines)}
    drawn = line_chart([Line(points, styles[name]) for name, points in lines.items()], x="round", y=y, words=y)
    if drawn is None:
        return ""
    mark = '<svg viewBox="0 0 16 8"><polyline class="line {}" points="1,4 15,4"/></svg>'
    named = [f"<span>{mark.format(styles[name])}{html.escape(name)}</span>" for name, points in lines.items() if points]
    return f'{drawn}<p class="legend">{"".join(named)}</p>'
