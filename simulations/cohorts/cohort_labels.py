"""The labels of a cohort: as its `cohort.toml` describes them, or inferred from the label tables of all places."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from panfm.config import load_site, site_folders
from panfm.data.label_kinds import LabelKind, infer_kinds, read_rules
from panfm.data.labels import LabelTable, read_site_cells
from panfm.evaluate.probe_labels import LabelInfo, read_label_info

_USUAL = "labels.csv"


@dataclass(frozen=True)
class CohortLabels:
    """Labels that are probed."""

    info: Mapping[str, LabelInfo]
    kinds: Mapping[str, LabelKind] | None = None
    """How the columns of label tables are read; None where `cohort.toml` describes the labels, and all are numbers."""
    notes: tuple[str, ...] = ()
    """One line for each column that was not plain, and for each label table that `site.toml` does not name."""


def read_cohort_labels(folder: Path) -> CohortLabels:
    """The labels of a cohort's folder.

    Raises:
        ConfigError, DataError: a label table, `labels.toml` or `cohort.toml` does not hold.
    """
    if (folder / "cohort.toml").exists() and (described := read_label_info(folder)):
        return CohortLabels(described)
    tables, notes = [], []
    for place in places_of(folder):
        site = load_site(place)
        if site.labels is not None:
            tables.append(read_site_cells(place, site))
        elif (place / _USUAL).exists():
            notes.append(f'{place / _USUAL}: is not read, as site.toml does not name it: labels = "{_USUAL}"')
    return _inferred(tables, notes)


def places_of(folder: Path) -> list[Path]:
    """Folders of a cohort's sites, and of its held-out subjects if there are any."""
    holdout = folder / "holdout"
    return [*site_folders(folder / "sites"), *([holdout] if (holdout / "site.toml").is_file() else [])]


def _inferred(tables: list[LabelTable], notes: list[str]) -> CohortLabels:
    kinds = infer_kinds(tables, read_rules(tables))
    info: dict[str, LabelInfo] = {}
    for name, kind in kinds.by_column.items():
        if kind.kind == "classes":
            info |= {f"{name}={value}": LabelInfo("class") for value in kind.values}
        elif kind.kind != "ignore":
            info[name] = LabelInfo("volume" if kind.kind == "number" else "class")
    return CohortLabels(info, kinds.by_column, (*notes, *kinds.notes))
