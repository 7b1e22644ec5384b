"""Charts as HTML and SVG text, without a script: bars with intervals, lines, points.

Sizes suit a column of 20 rem; the page lays as many columns side by side as it has room for, so that no chart is
scaled down until its words are too small. Colours are the CSS classes `c0` to `c7` of the page's style.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from panfm.report.blocks import Html

COLOURS = 8
WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 34
_MOST_POINTS = 150
_LARGEST = 1e30
_SIDE = 300

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """One bar of a chart of scores."""

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan
    style: str = "reference"
    """CSS class: ours, best, site or reference."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    points: Points
    style: str
    """CSS classes: a colour, and `thin` or `dashed`."""


def interval_bars(bars: Sequence[Bar], *, start: float, axis: str, text: Mapping[str, str]) -> Html:
    """Draw horizontal bars from `start`, with whiskers; a bar without a finite value has only its label and text.

    Args:
        start: Where bars begin: .5 for an AUC, 0 for R2.
        axis: Name of the axis.
        text: Label -> the value as text.
    """
    finite = [number for bar in bars for number in (bar.value, bar.low, bar.high) if _is_drawn(number)]
    low, high, ticks = _axis(min([start, *finite]), max([start, *finite]), most=5)

    def share(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    rows = []
    for bar in bars:
        drawn = ""
        if _is_drawn(bar.value):
            left, right = sorted((start, bar.value))
            width = 100 * (right - left) / (high - low)
            drawn = f'<span class="bar" style="left:{share(left)};width:{width:.2f}%"></span>'
            if _is_drawn(bar.low) and _is_drawn(bar.high):
                width = 100 * (bar.high - bar.low) / (high - low)
                drawn += f'<span class="whisker" style="left:{share(bar.low)};width:{width:.2f}%"></span>'
        rows.append(
            f'<li class="{bar.style}"><span class="name">{html.escape(bar.label)}</span>'
            f'<span class="track" aria-hidden="true"><span class="start" style="left:{share(start)}"></span>{drawn}'
            f'</span><span class="value">{html.escape(text[bar.label])}</span></li>'
        )
    marks = "".join(f'<span style="left:{share(tick)}">{_short(tick)}</span>' for tick in ticks)
    scale = f'<div class="scale" aria-hidden="true"><span></span><span class="ticks">{marks}</span><span></span></div>'
    return Html(f'<ul class="bars">{"".join(rows)}</ul>{scale}<p class="axis">{html.escape(axis)}</p>')


def line_chart(
    lines: Sequence[Line], *, x: str, y: str, words: str, span: tuple[float, float] | None = None
) -> Html | None:
    """Draw a chart of lines; None if no point is finite.

    Args:
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        words: Description for readers who cannot see the chart.
        span: Least and greatest value of the vertical axis, so that charts side by side have the same.
    """
    kept = [Line(_thinned(line.points), line.style) for line in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return None
    xs, ys = zip(*(point for line in kept for point in line.points), strict=True)
    first, last = min(xs), max(xs)
    low, high, ticks = _axis(*(span or (min(ys), max(ys))), most=5)

    def across(value: float) -> float:
        share = (value - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    drawn = [_grid([(down(tick), _short(tick)) for tick in ticks], _x_marks(first, last, across))]
    for line in kept:
        path = " ".join(f"{across(at):.1f},{down(value):.1f}" for at, value in line.points)
        drawn.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if len(line.points) == 1:
            drawn.append(f'<polyline class="line dot {line.style}" points="{path} {path}"/>')
    floor = HEIGHT - _BOTTOM
    names = (
        f'<text class="name" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{html.escape(x)}</text>"
        f'<text class="name" transform="translate(14 {(floor + _TOP) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y)}</text>"
    )
    return _svg(WIDTH, HEIGHT, words, "".join(drawn) + names)


def scatter(points: Points, colours: Sequence[int], *, x: str, y: str, words: str) -> Html:
    """Draw points in a square, each in the style of its number (`mark_style`); -1 is drawn grey, below the others."""
    xs, ys = zip(*points, strict=True)
    room = _SIDE - 34

    def place(value: float, values: Sequence[float]) -> float:
        least, most = min(values), max(values)
        return 8 + (value - least) / (most - least) * room if most > least else 8 + room / 2

    dots: dict[int, list[str]] = {}
    for (at, up), colour in zip(points, colours, strict=True):
        dots.setdefault(colour, []).append(f"M{20 + place(at, xs):.0f} {room + 16 - place(up, ys):.0f}h0")
    drawn = [
        f'<path class="{"dots none" if colour < 0 else mark_style(colour)}" d="{"".join(dots[colour])}"/>'
        for colour in sorted(dots)
    ]
    floor = room + 16
    axes = (
        f'<path class="frame" d="M20 0V{floor}H{_SIDE}"/>'
        f'<text class="name" x="{_SIDE / 2 + 9}" y="{_SIDE - 3}" text-anchor="middle">{html.escape(x)}</text>'
        f'<text class="name" transform="translate(14 {floor / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y)}</text>"
    )
    return _svg(_SIDE, _SIDE, words, axes + "".join(drawn))


def mark_style(number: int) -> str:
    """CSS classes of the points with some number: eight colours as dots, then the same colours as squares."""
    return f"dots c{number % COLOURS}{' square' if number >= COLOURS else ''}"


def _svg(width: int, height: int, words: str, drawn: str) -> Html:
    return Html(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(words, quote=True)}">{drawn}</svg>'
    )


def _grid(rows: Sequence[tuple[float, str]], columns: Sequence[tuple[float, str, str]]) -> str:
    floor = HEIGHT - _BOTTOM
    parts = [f'<path class="grid" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>' for at, _ in rows]
    parts += [f'<text x="{_LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{words}</text>' for at, words in rows]
    parts += [
        f'<text x="{at:.1f}" y="{floor + 14}" text-anchor="{anchor}">{words}</text>' for at, words, anchor in columns
    ]
    return "".join(parts) + f'<path class="frame" d="M{_LEFT} {_TOP}V{floor}H{WIDTH - _RIGHT}"/>'


def _x_marks(first: float, last: float, across: Callable[[float], float]) -> list[tuple[float, str, str]]:
    """Position, text and `text-anchor` of at most five whole numbers below a chart."""
    step = max(_nice((last - first) / 4), 1.0)
    start = math.ceil(first / step) * step
    ticks = [start + index * step for index in range(int((last - start) / step + 1e-9) + 1)] or [first]
    return [(across(tick), f"{tick:g}", "end" if tick == last and last > first else "middle") for tick in ticks]


def _axis(low: float, high: float, *, most: int) -> tuple[float, float, list[float]]:
    """Round number below `low`, round number above `high`, and about `most` ticks between them."""
    if not high > low:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    step = _nice((high - low) / (most - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [number * step for number in range(first, last + 1)]


def _nice(step: float) -> float:
    """Round a step up to 1, 2 or 5 times a power of ten; 1 for a step of 0."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _short(value: float) -> str:
    """Text of a tick, in few characters."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _is_drawn(value: float) -> bool:
    """Whether a number is finite and small enough that differences of such numbers are finite too."""
    return abs(value) < _LARGEST


def _thinned(points: Points) -> Points:
    """Thin out the finite points to at most `_MOST_POINTS`, the last one among them."""
    finite = [(at, value) for at, value in points if _is_drawn(value)]
    step = -(-len(finite) // _MOST_POINTS) or 1
    return finite[::-1][::step][::-1]
