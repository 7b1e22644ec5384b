"""CSV tables of a site: a header, then rows; UTF-8, with or without the mark that Excel adds.

The table of labels, for probes, has a column `subject` and one per label. It never leaves the site.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panfm.config import SiteConfig, site_path
from panfm.errors import DataError

Line = tuple[int, dict[str, str]]
"""Line number, counted from 1, and the stripped cells by column."""


def read_table(
    path: Path, needed: Sequence[str], optional: Sequence[str] | None = None
) -> tuple[list[str], list[Line]]:
    """Columns and rows of a CSV file; blank lines are skipped.

    Args:
        path: The file.
        needed: Columns it must have.
        optional: Columns it may have besides; any when None.
    Raises:
        DataError: what is wrong, without the path.
    """
    columns, rows = _cells(path)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DataError(f"no column {', '.join(missing)}")
    allowed = columns if optional is None else [*needed, *optional]
    for name in columns:
        if name not in allowed or not name:
            raise DataError(f"unknown column {name!r}, known: {', '.join(allowed)}")
        if columns.count(name) > 1:
            raise DataError(f"column {name!r} twice")
    for line, cells in rows:
        if len(cells) != len(columns):
            raise DataError(f"{len(cells)} cells on line {line} under {len(columns)} columns")
    return columns, [(line, dict(zip(columns, cells, strict=True))) for line, cells in rows]


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write what `read_table` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except FileNotFoundError as error:
        raise DataError("no such file") from error
    except csv.Error as error:
        raise DataError(f"no UTF-8 CSV file ({error})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no UTF-8 CSV file ({type(error).__name__})") from error
    return (rows[0][1] if rows else []), rows[1:]


@dataclass(frozen=True)
class Labels:
    """One row per subject, in the order of the file."""

    subjects: tuple[str, ...]
    names: tuple[str, ...]
    values: NDArray[np.float64]
    """[subjects, labels]; NaN where unknown."""


def read_labels(folder: Path, site: SiteConfig) -> Labels:
    """Read the label table that `site.toml` names; an empty cell is unknown.

    Raises:
        DataError: there is none, or a line of it does not hold.
    """
    if site.labels is None:
        raise DataError(f'{folder / "site.toml"}: names no label table, expected labels = "labels.csv"')
    return read_label_table(site_path(folder, site.labels))


def read_label_table(path: Path) -> Labels:
    """Read one label table; an empty cell is unknown. Raises DataError: a line of it does not hold."""
    try:
        columns, lines = read_table(path, ("subject",))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    names = tuple(name for name in columns if name != "subject")
    subjects: dict[str, int] = {}
    for line, cells in lines:
        if not cells["subject"]:
            raise DataError(f"{path}:{line}: found no subject, expected one")
        if subjects.setdefault(cells["subject"], line) != line:
            raise DataError(f"{path}:{line}: found subject {cells['subject']!r} again, expected one row per subject")
    values = [[_value(cells[name], f"{path}:{line}: {name}") for name in names] for line, cells in lines]
    return Labels(tuple(subjects), names, np.array(values, dtype=np.float64).reshape(len(lines), len(names)))


def _value(text: str, where: str) -> float:
    try:
        value = float(text or "nan")
    except ValueError as error:
        raise DataError(f"{where}: found {text!r}, expected a number or nothing") from error
    if np.isinf(value):
        raise DataError(f"{where}: found {text!r}, expected a finite number or nothing")
    return value
