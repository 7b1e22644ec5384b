"""Labels of a site's subjects, for probes: a table of `subject` and one column per label. It never leaves the site."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panfm.config import SiteConfig, site_path
from panfm.data.subjects import SHORTENED, is_shortened, subject_key
from panfm.data.tables import read_table
from panfm.errors import DataError


@dataclass(frozen=True)
class LabelTable:
    """A label table as it is written: one row per subject, in the order of the file."""

    path: Path
    subjects: tuple[str, ...]
    lines: tuple[int, ...]
    """Line of each subject, counted from 1."""
    cells: Mapping[str, tuple[str, ...]]
    """Column -> text of every subject; empty where unknown."""


@dataclass(frozen=True)
class Labels:
    """One row per subject, in the order of the file."""

    subjects: tuple[str, ...]
    names: tuple[str, ...]
    values: NDArray[np.float64]
    """[subjects, labels]; NaN where unknown."""


def read_labels(folder: Path, site: SiteConfig) -> Labels:
    """Read the label table that `site.toml` names, all of numbers; an empty cell is unknown.

    Raises:
        DataError: there is none, or a line of it does not hold.
    """
    return read_label_table(_table_path(folder, site))


def read_site_cells(folder: Path, site: SiteConfig) -> LabelTable:
    """Read the label table that `site.toml` names as it is written. Raises DataError: there is none, or no table."""
    return read_cells(_table_path(folder, site))


def _table_path(folder: Path, site: SiteConfig) -> Path:
    if site.labels is None:
        raise DataError(f'{folder / "site.toml"}: names no label table, expected labels = "labels.csv"')
    return site_path(folder, site.labels)


def read_label_table(path: Path) -> Labels:
    """Read one label table of numbers; an empty cell is unknown. Raises DataError: a line of it does not hold."""
    table = read_cells(path)
    return numbers_of(table, table.cells)


def numbers_of(table: LabelTable, names: Collection[str]) -> Labels:
    """Read some columns of a table as numbers. Raises DataError: a cell of them is none."""
    columns = {name: column for name, column in table.cells.items() if name in names}
    values = [
        [_value(text, f"{table.path}:{line}: {name}") for line, text in zip(table.lines, column, strict=True)]
        for name, column in columns.items()
    ]
    shape = (len(columns), len(table.subjects))
    return Labels(table.subjects, tuple(columns), np.array(values, dtype=np.float64).reshape(shape).T)


def read_cells(path: Path) -> LabelTable:
    """Read one label table as it is written. Raises DataError: no table, or a row without a subject of its own."""
    try:
        columns, lines = read_table(path, ("subject",))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    names = tuple(name for name in columns if name != "subject")
    subjects: dict[str, int] = {}
    for line, cells in lines:
        if not cells["subject"]:
            raise DataError(f"{path}:{line}: found no subject, expected one")
        if is_shortened(cells["subject"]):
            raise DataError(f"{path}:{line}: found subject {cells['subject']!r}, expected {SHORTENED}")
        if subjects.setdefault(subject_key(cells["subject"]), line) != line:
            raise DataError(f"{path}:{line}: found subject {cells['subject']!r} again, expected one row per subject")
    columns_of_cells = {name: tuple(cells[name] for _, cells in lines) for name in names}
    spelled = tuple(cells["subject"] for _, cells in lines)
    return LabelTable(path, spelled, tuple(line for line, _ in lines), columns_of_cells)


def _value(text: str, where: str) -> float:
    try:
        value = float(text.replace("_", "no number") or "nan")
    except ValueError as error:
        hint = " (with a decimal point)" if "," in text else ""
        raise DataError(f"{where}: found {text!r}, expected a number or nothing{hint}") from error
    if np.isinf(value):
        raise DataError(f"{where}: found {text!r}, expected a finite number or nothing")
    return value
