"""Labels of a site's subjects, for probes: a table of `subject` and one column per label. It never leaves the site."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panfm.config import SiteConfig, site_path
from panfm.data.subjects import subject_key
from panfm.data.tables import read_table
from panfm.errors import DataError


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
        if subjects.setdefault(subject_key(cells["subject"]), line) != line:
            raise DataError(f"{path}:{line}: found subject {cells['subject']!r} again, expected one row per subject")
    values = [[_value(cells[name], f"{path}:{line}: {name}") for name in names] for line, cells in lines]
    return Labels(
        tuple(cells["subject"] for _, cells in lines),
        names,
        np.array(values, dtype=np.float64).reshape(len(lines), len(names)),
    )


def _value(text: str, where: str) -> float:
    try:
        value = float(text.replace("_", "no number") or "nan")
    except ValueError as error:
        hint = " (with a decimal point)" if "," in text else ""
        raise DataError(f"{where}: found {text!r}, expected a number or nothing{hint}") from error
    if np.isinf(value):
        raise DataError(f"{where}: found {text!r}, expected a finite number or nothing")
    return value
