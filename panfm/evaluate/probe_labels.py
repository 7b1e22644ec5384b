"""Labels that are probed: their values for the subjects of a place, and their meaning.

`cohort.toml` says of each label its kind, whether it is carried by weak organs, and which organs carry it. Groups of
labels are what tables show: `all`, `weak`, one per kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.config import StreamConfig, load_site
from panfm.data.cache import open_store
from panfm.data.labels import read_labels
from panfm.data.store import ImageStore
from panfm.data.subjects import subject_key
from panfm.errors import ConfigError, DataError, reason
from panfm.texts import parse_toml, read_text

_MAX_COHORT_BYTES = 1 << 20
KINDS = ("category", "disease", "class", "volume")


@dataclass(frozen=True)
class LabelInfo:
    """Meaning of one label."""

    kind: str
    """category, disease or class (0 or 1; of a set of classes one holds), or volume (a number)."""
    weak: bool = False
    """Carried by organs that do not dominate."""
    organs: tuple[str, ...] = ()
    """Organs that carry it."""

    @property
    def is_number(self) -> bool:
        """Whether the label is probed by regression, not classification."""
        return self.kind == "volume"


@dataclass(frozen=True)
class LabelledStore:
    """One place's images and labels."""

    store: ImageStore
    labels: Mapping[str, NDArray[np.float64]]
    """Label -> float64 [subjects of the store], NaN where unknown."""

    @classmethod
    def open(cls, folder: Path, streams: Mapping[str, StreamConfig]) -> "LabelledStore":
        """A site folder's images and, where it has them, labels. Raises as `open_store` and `read_labels`."""
        store, site = open_store(folder, streams), load_site(folder)
        if site.labels is None:
            return cls(store, {})
        table = read_labels(folder, site)
        row = {subject_key(subject): index for index, subject in enumerate(table.subjects)}
        padded = np.vstack([table.values, np.full((1, len(table.names)), np.nan)])
        values = padded[[row.get(subject_key(subject), -1) for subject in store.subjects]]
        return cls(store, dict(zip(table.names, values.T, strict=True)))

    def values(self, names: Sequence[str], indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Values [len(indices), len(names)]; a label this place does not record is unknown for all."""
        unknown = np.full(len(self.store.subjects), np.nan)
        columns = [self.labels.get(name, unknown)[indices] for name in names]
        return np.stack(columns, axis=1) if columns else np.empty((len(indices), 0))


def label_groups(info: Mapping[str, LabelInfo]) -> dict[str, list[str]]:
    """Groups of yes/no labels, empty groups left out: `all`, `weak`, `category`, `disease`."""
    yes_no = [name for name, label in info.items() if not label.is_number]
    groups = {
        "all": yes_no,
        "weak": [name for name in yes_no if info[name].weak],
        "category": [name for name in yes_no if info[name].kind == "category"],
        "disease": [name for name in yes_no if info[name].kind == "disease"],
    }
    return {group: names for group, names in groups.items() if names}


def read_label_info(cohort_folder: Path) -> dict[str, LabelInfo]:
    """The `[labels.<name>]` tables of a cohort's `cohort.toml`.

    Raises:
        DataError: the file is absent, not TOML, or a label has no known kind.
    """
    path = cohort_folder / "cohort.toml"
    try:
        text = read_text(path, max_bytes=_MAX_COHORT_BYTES)
        tables = parse_toml(text, str(path), max_bytes=_MAX_COHORT_BYTES).get("labels", {})
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise DataError(f"{path}: expected a readable TOML file ({reason(error)})") from error
    return {name: _label_info(table, f"{path}: labels.{name}") for name, table in tables.items()}


def _label_info(table: Any, where: str) -> LabelInfo:
    kind = table.get("kind") if isinstance(table, dict) else None
    if kind not in KINDS:
        raise DataError(f"{where}.kind: expected one of {', '.join(KINDS)} (got {kind!r})")
    return LabelInfo(kind, bool(table.get("weak", False)), tuple(table.get("organs", ())))
