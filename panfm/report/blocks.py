"""Blocks of a report's sections: paragraphs, tables, charts, pictures. Templates turn them into escaped HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class Html(str):
    """Text that is HTML already, with all text from outside escaped; templates insert it unchanged."""

    __slots__ = ()

    def __html__(self) -> "Html":
        return self


@dataclass(frozen=True)
class Paragraph:
    """One or more sentences."""

    kind: ClassVar = "paragraph"
    text: str
    is_quiet: bool = False


@dataclass(frozen=True)
class Table:
    """A table of text; the first cell of a row names the row."""

    kind: ClassVar = "table"
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    shades: Sequence[Sequence[float]] = ()
    """Darkness in [0, 1] of every cell, without those of the first column; empty if no cell is shaded."""


@dataclass(frozen=True)
class Figure:
    """A chart with its title, its legend, and a table of the numbers that it shows."""

    title: str
    chart: Html
    legend: Sequence[tuple[str, str]] = ()
    """CSS class and meaning of each mark."""
    numbers: Table | None = None


@dataclass(frozen=True)
class Figures:
    """Charts side by side, as many as fit the width of the page, with one legend for all."""

    kind: ClassVar = "figures"
    figures: Sequence[Figure]
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Picture:
    """One small grey or colour picture."""

    png: str
    """The PNG file in base64."""
    words: str
    """Description for readers who cannot see the picture."""


@dataclass(frozen=True)
class PictureRow:
    """A titled row of pictures that belong together."""

    title: str
    pictures: Sequence[tuple[str, Picture]]
    """Caption and picture, from left to right."""


@dataclass(frozen=True)
class Pictures:
    """Rows of pictures."""

    kind: ClassVar = "pictures"
    rows: Sequence[PictureRow]


@dataclass(frozen=True)
class Details:
    """A part of the page that readers open by a click: further blocks, or preformatted text."""

    kind: ClassVar = "details"
    summary: str
    blocks: Sequence["Block"] = ()
    text: str = ""


Block = Paragraph | Table | Figures | Pictures | Details


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    key: str
    """Anchor of the section: `#key` links to it."""
    title: str
    blocks: Sequence[Block]


def absent(key: str, title: str, reason: str) -> Section:
    """Make a section that says in one sentence why there is nothing to show."""
    return Section(key, title, [Paragraph(reason, is_quiet=True)])
