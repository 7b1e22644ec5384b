"""Rows of a manifest that are left out of every run: `quarantine.csv`, read and matched with the rows that there are.

An entry means the row with its subject, stream and path, wherever it stands. Where that row has gone, it means the row
of the same subject and stream whose image has the same content.
"""

import os.path
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from panfm.data.content import content_digest
from panfm.data.readers import ImageError, find_reader
from panfm.data.subjects import subject_key
from panfm.data.tables import read_table
from panfm.errors import DataError

LISTED = ("subject", "stream", "path", "copy", "voxels", "reason")
"""Columns of the list."""


class ManifestRow(Protocol):
    """What an entry says of a row."""

    @property
    def subject(self) -> str:
        """The patient."""
        ...

    @property
    def stream(self) -> str:
        """Organ and modality."""
        ...

    @property
    def path(self) -> str:
        """Of the image, as it is written."""
        ...


R = TypeVar("R", bound=ManifestRow)


@dataclass(frozen=True)
class Listed:
    """One row of the quarantine."""

    subject: str
    stream: str
    path: str
    copy: int
    """Which of the rows with this subject, stream and path, from 1."""
    voxels: str
    """Hash of the image's content; empty where it could not be read."""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells the row from others, as `numbered` has it."""
        return subject_key(self.subject), self.stream, os.path.normpath(self.path), self.copy


def read_quarantine(path: Path) -> tuple[Listed, ...]:
    """Entries of a list; none when there is no such file. Raises DataError: unreadable."""
    if not path.exists():
        return ()
    try:
        _, lines = read_table(path, LISTED)
        return tuple(
            Listed(cells["subject"], cells["stream"], cells["path"], int(cells["copy"]), cells["voxels"])
            for _, cells in lines
        )
    except (DataError, ValueError) as error:
        raise DataError(f"{path}: not a quarantine list, run `panfm site check --quarantine` again") from error


def without_listed(rows: Iterable[R], path: Path, image: Callable[[R], Path]) -> list[R]:
    """Rows that a list does not mean.

    Args:
        path: Of the list.
        image: Path of a row's image.
    Raises:
        DataError: as `read_quarantine`.
    """
    left = {key: row for row, key in numbered(rows)}
    moved = [entry for entry in read_quarantine(path) if left.pop(entry.key, None) is None and entry.voxels]
    for entry in moved:
        same = [key for key, row in left.items() if key[:2] == entry.key[:2] and content_of(image(row)) == entry.voxels]
        left.pop(same[0] if same else entry.key, None)
    return list(left.values())


def content_of(path: Path) -> str:
    """Hash of an image's content, in hexadecimal; empty if it cannot be read."""
    try:
        return content_digest(find_reader(path).read(path)).hex()
    except ImageError:
        return ""


def numbered(rows: Iterable[R]) -> Iterator[tuple[R, tuple[str, str, str, int]]]:
    """Rows with what tells them apart: subject, stream and path, and which of equal ones a row is, from 1."""
    copies: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        key = (subject_key(row.subject), row.stream, os.path.normpath(row.path))
        copies[key] += 1
        yield row, (*key, copies[key])
