"""Parts of our HTML pages: tables and line charts (SVG text without a script). Every word that goes in is escaped."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
.quiet { color: #666 }
"""

Rows = Iterable[Sequence[str]]


def section(title: str, body: str) -> str:
    """A heading above a piece of HTML; empty if the piece is empty."""
    return f"<h2>{html.escape(title)}</h2>{body}" if body else ""


def table(headings: Sequence[str], rows: Rows) -> str:
    """A table of plain words."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(headings, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 220, 60, 24
_MOST_POINTS = 300

Points = Sequence[tuple[int, float]]


def line_chart(lines: Mapping[str, Points]) -> str:
    """A chart of numbers by round, with a legend; empty if there is no finite number."""
    kept = {name: _thinned([(x, y) for x, y in points if math.isfinite(y)]) for name, points in lines.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs, ys = zip(*(point for points in kept.values() for point in points), strict=True)
    low, high = min(ys), max(ys)
    if low == high:
        low, high = low - 1.0, high + 1.0

    def place(x: float, y: float) -> str:
        across = (x - min(xs)) / (max(xs) - min(xs) or 1)
        return (
            f"{_LEFT + across * (_WIDTH - _LEFT - 8):.1f},{8 + (high - y) / (high - low) * (_HEIGHT - _BOTTOM - 8):.1f}"
        )

    drawn, legend = [], []
    for number, (name, points) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        at = place(*points[-1]).split(",")
        drawn.append(f'<circle cx="{at[0]}" cy="{at[1]}" r="2.5" fill="{colour}"/>')
        legend.append(f'<span style="color:{colour}">&#9632;</span> {html.escape(name)}')
    floor = _HEIGHT - _BOTTOM
    axes = (
        f'<path d="M{_LEFT} 8V{floor}H{_WIDTH}" fill="none" stroke="#999"/>'
        f'<text x="{_LEFT - 6}" y="16" text-anchor="end">{high:.4g}</text>'
        f'<text x="{_LEFT - 6}" y="{floor}" text-anchor="end">{low:.4g}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">round {min(xs)}</text>'
        f'<text x="{_WIDTH - 4}" y="{_HEIGHT - 6}" text-anchor="end">{max(xs)}</text>'
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{axes}{"".join(drawn)}</svg><p>{" &nbsp; ".join(legend)}</p>'


def _thinned(points: Points) -> Points:
    """At most so many points, the last among them."""
    step = -(-len(points) // _MOST_POINTS) or 1
    return points[::-1][::step][::-1]
