"""Labels that are probed: their values for the subjects of a place, and their meaning.

`cohort.toml` says of each label its kind, whether it is carried by weak organs, and which organs carry it. Groups of
labels are what tables show: `all`, `weak`, one per kind.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.config import StreamConfig, load_site
from panfm.data.cache import open_store
from panfm.data.joins import Join
from panfm.data.label_kinds import LabelKind, encode
from panfm.data.labels import read_labels, read_site_cells
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
class Unmatched:
    """Subjects of one place that stand on one side only."""

    without_row: tuple[str, ...] = ()
    """Subjects with images, but without a row in the label table."""
    without_images: tuple[str, ...] = ()
    """Subjects of the label table without an image of the run."""

    @classmethod
    def of(cls, with_images: Collection[str], with_row: Collection[str]) -> "Unmatched":
        """Compare the subjects of a manifest with those of a label table."""
        join = Join.of(with_images, with_row)
        return cls(join.left, join.right)


@dataclass(frozen=True)
class LabelledStore:
    """One place's images and labels."""

    store: ImageStore
    labels: Mapping[str, NDArray[np.float64]]
    """Label -> float64 [subjects of the store], NaN where unknown."""
    name: str = ""
    """The site's."""
    unmatched: Unmatched = Unmatched()

    @classmethod
    def open(
        cls, folder: Path, streams: Mapping[str, StreamConfig], kinds: Mapping[str, LabelKind] | None = None
    ) -> "LabelledStore":
        """A site folder's images and, where it has them, labels.

        Args:
            kinds: How its label table is read; as numbers when None.
        Raises:
            PanfmError: as `open_store` and `read_labels`, or a label is none of its column's values.
        """
        store, site = open_store(folder, streams), load_site(folder)
        if site.labels is None:
            return cls(store, {}, site.name)
        table = read_labels(folder, site) if kinds is None else encode(read_site_cells(folder, site), kinds)
        row = {subject_key(subject): index for index, subject in enumerate(table.subjects)}
        padded = np.vstack([table.values, np.full((1, len(table.names)), np.nan)])
        values = padded[[row.get(subject_key(subject), -1) for subject in store.subjects]]
        labels = dict(zip(table.names, values.T, strict=True))
        return cls(store, labels, site.name, Unmatched.of(store.subjects, table.subjects))

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
