"""What a report's sections are made of. Templates turn them into HTML, and escape every word of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class Html(str):
    """Text that is HTML already, every foreign word in it escaped; templates leave it as it is."""

    __slots__ = ()

    def __html__(self) -> "Html":
        return self


@dataclass(frozen=True)
class Paragraph:
    """A sentence or some."""

    kind: ClassVar = "paragraph"
    text: str
    is_quiet: bool = False


@dataclass(frozen=True)
class Table:
    """A table of words; the first column names the row."""

    kind: ClassVar = "table"
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    shades: Sequence[Sequence[float]] = ()
    """One number in [0, 1] per cell, the first column left out: how dark the cell is; none of an unshaded table."""


@dataclass(frozen=True)
class Figure:
    """A chart with its title, its legend, and the numbers that it shows."""

    title: str
    chart: Html
    legend: Sequence[tuple[str, str]] = ()
    """CSS class of the mark, and what it stands for."""
    numbers: Table | None = None


@dataclass(frozen=True)
class Figures:
    """Charts side by side, as many as the page is wide, with a legend for all of them."""

    kind: ClassVar = "figures"
    figures: Sequence[Figure]
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Picture:
    """One small grey or colour picture."""

    png: str
    """Base64."""
    words: str
    """What it shows, for those who do not see it."""


@dataclass(frozen=True)
class PictureRow:
    """Pictures that belong together."""

    title: str
    pictures: Sequence[tuple[str, Picture]]
    """Caption and picture."""


@dataclass(frozen=True)
class Pictures:
    """Rows of pictures."""

    kind: ClassVar = "pictures"
    rows: Sequence[PictureRow]


@dataclass(frozen=True)
class Details:
    """Something to be opened: further blocks, or a text as it is."""

    kind: ClassVar = "details"
    summary: str
    blocks: Sequence["Block"] = ()
    text: str = ""


Block = Paragraph | Table | Figures | Pictures | Details


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    key: str
    """Its anchor."""
    title: str
    blocks: Sequence[Block]


def absent(key: str, title: str, reason: str) -> Section:
    """A section that says in one sentence why there is nothing to show."""
    return Section(key, title, [Paragraph(reason, is_quiet=True)])
