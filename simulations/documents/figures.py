"""Draws the figures of README and docs as SVG, from the result files of studies in docs/results/data."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from simulations.documents.figure_style import STYLE
from simulations.documents.scale_figure import scale_figure

_NAMES, _PANEL, _GAP, _ROW, _TOP = 290, 300, 50, 30, 84
"""Pixels: width of the row names, width of a panel, gap between panels, height of a row, space above the rows."""
_LEAST, _MOST = 0.5, 0.75
"""Range of the AUC axis; it begins at .5, the AUC of guessing."""
_DEMO_ARMS = {
    "federated": "federated: five hospitals together",
    "best-site": "the best hospital alone",
    "tokenizer": "no network: linear on its inputs",
    "untrained": "the same network before training",
    "statistics": "no network: plain statistics",
}
_DEMO_METRICS = {"auc": "labels of all patients", "auc_100": "labels of 100 patients"}


@dataclass(frozen=True)
class Row:
    """One row of a panel: the values of one model."""

    name: str
    values: Sequence[float]
    """One value per seed."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return sum(self.values) / len(self.values)


def figures(data: Path) -> dict[str, str]:
    """Draw every figure; return file name -> SVG.

    Args:
        data: Folder of the result files.
    """
    drawn = {"demo": demo_figure, "scale": scale_figure}
    return {
        f"{name}.svg": draw(json.loads((data / f"{name}.json").read_text(encoding="utf-8")))
        for name, draw in drawn.items()
    }


def demo_figure(result: Mapping[str, Any]) -> str:
    """Draw the result of `study demo`: AUC of each model, with the labels of all patients and of 100."""
    values = {(row["metric"], row["arm"]): row["values"] for row in result["results"]}
    panels = {
        title: [Row(name, values[metric, arm]) for arm, name in _DEMO_ARMS.items()]
        for metric, title in _DEMO_METRICS.items()
    }
    number = len(values["auc", "federated"])
    return panel_chart(
        "Linear probe on frozen features of held-out patients: AUC",
        f"Bars: mean of {number} draws of the phantom; dots: each draw. Chance is .5. Commit {result['commit']}.",
        panels,
    )


def panel_chart(title: str, note: str, panels: Mapping[str, Sequence[Row]]) -> str:
    """Draw panels side by side: a bar for each row's mean, and a dot for each value. All panels have the same rows."""
    names = [row.name for row in next(iter(panels.values()))]
    width = _NAMES + len(panels) * (_PANEL + _GAP)
    height = _TOP + len(names) * _ROW + 44
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title">',
        f'<title id="title">{escape(title)}. {escape(_spoken(panels))}</title>',
        STYLE,
        f'<rect class="page" width="{width}" height="{height}"/>',
        f'<text class="head" x="16" y="28">{escape(title)}</text>',
        f'<text class="note" x="16" y="{height - 12}">{escape(note)}</text>',
        *(_name(index, name) for index, name in enumerate(names)),
    ]
    for index, (heading, rows) in enumerate(panels.items()):
        lines += _panel(_NAMES + index * (_PANEL + _GAP), heading, rows)
    return "\n".join([*lines, "</svg>\n"])


def _name(index: int, name: str) -> str:
    style = ' class="first"' if index == 0 else ""
    return f'<text{style} x="16" y="{_TOP + index * _ROW + 19}">{escape(name)}</text>'


def _panel(left: int, heading: str, rows: Sequence[Row]) -> Iterator[str]:
    bottom = _TOP + len(rows) * _ROW
    yield f'<text x="{left}" y="{_TOP - 28}">{escape(heading)}</text>'
    for tick in range(50, 76, 5):
        x = left + _x(tick / 100)
        yield f'<line class="grid" x1="{x:.1f}" y1="{_TOP - 4}" x2="{x:.1f}" y2="{bottom}"/>'
        yield f'<text class="note" x="{x:.1f}" y="{_TOP - 10}" text-anchor="middle">.{tick}</text>'
    for index, row in enumerate(rows):
        y = _TOP + index * _ROW
        style = "lead" if index == 0 else "mean"
        yield f'<rect class="{style}" x="{left}" y="{y + 6}" width="{_x(row.mean):.1f}" height="16" rx="2"/>'
        for value in row.values:
            yield f'<circle class="dot" cx="{left + _x(value):.1f}" cy="{y + 14}" r="4"/>'
        end = left + _x(max([row.mean, *row.values])) + 9
        yield f'<text class="note" x="{end:.1f}" y="{y + 19}">{_short(row.mean)}</text>'


def _x(value: float) -> float:
    """Distance of a value from the left edge of a panel, in pixels."""
    return max(0.0, (value - _LEAST) / (_MOST - _LEAST)) * _PANEL


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _spoken(panels: Mapping[str, Sequence[Row]]) -> str:
    """Write the means as sentences, for readers who cannot see the figure."""
    return " ".join(
        f"With {heading}: {', '.join(f'{row.name} {_short(row.mean)}' for row in rows)}."
        for heading, rows in panels.items()
    )
