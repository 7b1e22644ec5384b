"""Draws the result of `bench scale`: cost against what grows, both axes logarithmic, with fitted lines."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from simulations.documents.figure_style import STYLE

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _LEFT, _TOP = 230, 150, 70, 84, 62, 84
"""Pixels: a panel, the gaps between panels, and the space left of and above the first."""
_COLUMNS = 3
_UNITS = {
    "sites": "sites: one aggregation",
    "subjects": "subjects: a first pass",
    "organs": "organs: a step",
    "tokens": "tokens: a step",
    "experts": "experts: a step",
    "parameters": "parameters: a step",
}


def scale_figure(result: Mapping[str, Any]) -> str:
    """Draw a panel for each thing that grows."""
    panels = {name: _medians(result, name) for name in _UNITS}
    rows = math.ceil(len(panels) / _COLUMNS)
    width = _LEFT + _COLUMNS * (_WIDTH + _GAP_X)
    height = _TOP + rows * (_HEIGHT + _GAP_Y)
    title = "CPU seconds against what grows"
    spoken = ", ".join(f"{name} {result['ratios'][name]:.2f}" for name in panels)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title">',
        f'<title id="title">{title}. Fitted exponents: {spoken}.</title>',
        STYLE,
        f'<rect class="page" width="{width}" height="{height}"/>',
        f'<text class="head" x="16" y="28">{title}; both axes logarithmic</text>',
        f'<text class="note" x="16" y="{height - 12}">Points: medians; lines: fitted. Exponent 1 is in proportion. '
        f"Commit {escape(str(result['commit']))}.</text>",
    ]
    for index, (name, medians) in enumerate(panels.items()):
        left, top = _LEFT + index % _COLUMNS * (_WIDTH + _GAP_X), _TOP + index // _COLUMNS * (_HEIGHT + _GAP_Y)
        lines += _panel(left, top, f"{_UNITS[name]}, exponent {result['ratios'][name]:.2f}", medians)
    return "\n".join([*lines, "</svg>\n"])


def _medians(result: Mapping[str, Any], name: str) -> dict[float, float]:
    rows = [row for row in result["results"] if row.get("of") == name]
    return {float(row["arm"]): float(np.median(row["values"])) for row in rows}


def _panel(left: int, top: int, heading: str, medians: Mapping[float, float]) -> Iterator[str]:
    sizes, costs = [*map(math.log, medians)], [*map(math.log, medians.values())]
    slope, offset = map(float, np.polyfit(sizes, costs, 1))
    ends = [*costs, *(slope * size + offset for size in sizes)]
    x = _Axis(sizes, left, _WIDTH)
    y = _Axis([min(ends), max(max(ends), min(ends) + math.log(2.0))], top + _HEIGHT, -_HEIGHT)
    yield f'<text x="{left}" y="{top - 14}">{escape(heading)}</text>'
    yield f'<line class="grid" x1="{left}" y1="{top + _HEIGHT}" x2="{left + _WIDTH}" y2="{top + _HEIGHT}"/>'
    yield f'<line class="grid" x1="{left}" y1="{top}" x2="{left}" y2="{top + _HEIGHT}"/>'
    first, last = (f"{x(size):.1f} {y(slope * size + offset):.1f}" for size in (sizes[0], sizes[-1]))
    yield f'<path class="trend" d="M {first} L {last}"/>'
    for size, cost in zip(sizes, costs, strict=True):
        yield f'<circle class="dot" cx="{x(size):.1f}" cy="{y(cost):.1f}" r="4"/>'
        label = _size(math.exp(size))
        yield f'<text class="note" x="{x(size):.1f}" y="{top + _HEIGHT + 18}" text-anchor="middle">{label}</text>'
    for cost in (costs[0], costs[-1]):
        label = f"{math.exp(cost):.2g} s"
        yield f'<text class="note" x="{left - 8}" y="{y(cost) + 4:.1f}" text-anchor="end">{label}</text>'


class _Axis:
    """Pixels of values, from the smallest to the largest."""

    def __init__(self, values: Sequence[float], start: float, length: float) -> None:
        self._least, self._most, self._start, self._length = min(values), max(values), start, length

    def __call__(self, value: float) -> float:
        """Pixels of one value."""
        return self._start + self._length * (value - self._least) / (self._most - self._least)


def _size(value: float) -> str:
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k" if value >= 1e4 else f"{value:.0f}"
