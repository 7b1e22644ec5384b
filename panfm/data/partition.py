"""Parts one pooled site folder into simulated sites and a hold-out; every patient goes to one place with all images.

    iid      equal parts of a shuffled list
    size     p ~ Dirichlet(alpha, ..., alpha) over the sites: each gets its share p of a shuffled list
    label    the same, drawn anew for the patients of each value of a column of labels.csv, e.g. a diagnosis or scanner
    stream   the same, drawn anew for the patients of each set of streams

A small alpha makes sites unlike one another, a large one alike. The hold-out is drawn first, patients of the split test
before all others. Source: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
Visual Classification", arXiv 1909.06335 (label).
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from panfm.config import SiteConfig, dump_toml, load_site, site_path
from panfm.config.site_description import LimitsConfig
from panfm.data.labels import read_cells
from panfm.data.manifest import COLUMNS, Row, image_path, read_manifest
from panfm.data.subjects import subject_key
from panfm.errors import DataError
from panfm.outputs import new_folder, write_table
from panfm.seeds import numpy_generator

By = Literal["iid", "size", "label", "stream"]
HOLDOUT = "holdout"
_SIMULATED = LimitsConfig(smallest_batch=1, smallest_steps=1, training_labels="all")
"""A simulated site has no patients to protect by floors, and may be as small as it likes."""


@dataclass(frozen=True)
class PooledSite:
    """The site folder that is to be parted."""

    rows: tuple[Row, ...]
    """Paths are absolute."""
    labels: Mapping[str, Mapping[str, str]]
    """Subject -> column of labels.csv -> cell; of subjects that stand in it."""

    @classmethod
    def open(cls, folder: Path) -> "PooledSite":
        """Read manifest and labels. Raises ConfigError or DataError: one of them does not hold."""
        site = load_site(folder)
        rows = tuple(_absolute(folder, site, row) for row in read_manifest(folder, site))
        if site.labels is None:
            return cls(rows, {})
        path = site_path(folder, site.labels)
        table = read_cells(path)
        spelled = {subject_key(row.subject): row.subject for row in rows}
        columns = table.cells.items()
        return cls(
            rows,
            {
                spelled.get(subject_key(subject), subject): {name: cells[number] for name, cells in columns}
                for number, subject in enumerate(table.subjects)
            },
        )

    @property
    def label_names(self) -> tuple[str, ...]:
        """Columns of labels.csv after `subject`."""
        return tuple(next(iter(self.labels.values()), {}))

    def kinds(self, by: By, label: str | None) -> dict[str, str]:
        """Subject -> what decides how it is dealt out: one text for all, its label, or its streams.

        Raises:
            DataError: there is no such label, or it has a value of its own for most subjects.
        """
        subjects = list(dict.fromkeys(row.subject for row in self.rows))
        if by == "stream":
            streams: dict[str, set[str]] = defaultdict(set)
            for row in self.rows:
                streams[row.subject].add(row.stream)
            return {subject: " ".join(sorted(names)) for subject, names in streams.items()}
        if by != "label":
            return dict.fromkeys(subjects, "")
        if label not in self.label_names:
            known = ", ".join(self.label_names) or "none, as there is no labels.csv in site.toml"
            raise DataError(f"--label: found {label or 'nothing'}, expected a column of labels.csv: {known}")
        kinds = {subject: self.labels.get(subject, {}).get(label, "") for subject in subjects}
        if (values := len(set(kinds.values()))) > max(2, len(subjects) // 2):
            given = f"{values} different values of {len(subjects)} subjects"
            raise DataError(f"--label {label}: found {given}, expected classes, each of several subjects")
        return kinds


def draw_places(
    pooled: PooledSite, by: By, *, sites: int, holdout: float, alpha: float, seed: int, label: str | None = None
) -> dict[str, list[str]]:
    """Subjects of the hold-out and of every site, in the order of the manifest.

    Args:
        sites: How many.
        holdout: Share of the subjects that no site gets.
        alpha: Of the Dirichlet distribution; not used by iid.
        label: Column of labels.csv that `label` goes by.
    Raises:
        DataError: a site would have no training subject, or the label does not do.
    """
    kinds = pooled.kinds(by, label)
    splits = {row.subject: row.split for row in pooled.rows}
    shuffled = [str(one) for one in numpy_generator(seed, "partition", HOLDOUT).permutation(sorted(splits))]
    held_out = sorted(shuffled, key=lambda subject: splits[subject] != "test")[: round(holdout * len(shuffled))]
    place = dict.fromkeys(held_out, HOLDOUT)
    by_kind: dict[str, list[str]] = defaultdict(list)
    for subject in shuffled:
        if subject not in place:
            by_kind[kinds[subject]].append(subject)
    for kind in sorted(by_kind):
        generator = numpy_generator(seed, "partition", by, kind)
        shares = np.full(sites, 1 / sites) if by == "iid" else generator.dirichlet(np.full(sites, alpha))
        ends = np.round(np.cumsum(shares) * len(by_kind[kind])).astype(int)
        for number, part in enumerate(np.split(np.array(by_kind[kind], dtype=object), ends[:-1]), start=1):
            place |= dict.fromkeys(part, site_name(number, sites))
    places = {name: [subject for subject in splits if place[subject] == name] for name in _names(sites, holdout)}
    _require_training(places, splits, by)
    return places


def write_places(pooled: PooledSite, places: Mapping[str, Sequence[str]], out: Path) -> None:
    """Write `sites/<name>/` and `holdout/` with site.toml, manifest.csv and labels.csv; images stay where they are.

    Guarantees:
        relative: paths lead from each manifest to the images, so that all may move together.
    Raises:
        DataError: the folder exists, or cannot be written.
    """
    final = Path(os.path.realpath(out))
    with new_folder(final) as folder:
        for name, subjects in places.items():
            own = set(subjects)
            place = HOLDOUT if name == HOLDOUT else f"sites/{name}"
            (folder / place).mkdir(parents=True)
            site = SiteConfig(name=name, labels="labels.csv" if pooled.labels else None, limits=_SIMULATED)
            (folder / place / "site.toml").write_text(dump_toml(site), encoding="utf-8")
            rows = [_relative(row, final / place, name) for row in pooled.rows if row.subject in own]
            columns = [column for column in COLUMNS if column != "session" or any(row.session for row in pooled.rows)]
            write_table(folder / place / "manifest.csv", columns, [[getattr(row, c) for c in columns] for row in rows])
            if pooled.labels:
                cells = [(one, *pooled.labels[one].values()) for one in subjects if one in pooled.labels]
                write_table(folder / place / "labels.csv", ("subject", *pooled.label_names), cells)


def site_name(number: int, sites: int) -> str:
    """Name of a simulated site, counted from 1: `site-03` of 20."""
    return f"site-{number:0{len(str(sites))}d}"


def _names(sites: int, holdout: float) -> list[str]:
    return [*([HOLDOUT] if holdout else []), *(site_name(number, sites) for number in range(1, sites + 1))]


def _require_training(places: Mapping[str, Sequence[str]], splits: Mapping[str, str], by: By) -> None:
    empty = [name for name, own in places.items() if name != HOLDOUT and all(splits[one] != "train" for one in own)]
    if empty:
        remedy = "fewer --sites" if by == "iid" else "a larger --alpha, fewer --sites or another --seed"
        raise DataError(f"{', '.join(empty)}: no training subject, expected one at every site; give {remedy}")
    if HOLDOUT in places and not places[HOLDOUT]:
        raise DataError(f"holdout: no subject of {len(splits)}, expected at least one; give a larger --holdout, or 0")


def _absolute(folder: Path, site: SiteConfig, row: Row) -> Row:
    mask = str(image_path(folder, site, row.mask)) if row.mask else ""
    return replace(row, path=str(image_path(folder, site, row.path)), mask=mask)


def _relative(row: Row, folder: Path, place: str) -> Row:
    """A row as a place's manifest has it; held-out subjects are all in the split test."""
    mask = os.path.relpath(row.mask, folder) if row.mask else ""
    split = "test" if place == HOLDOUT else row.split
    return replace(row, path=os.path.relpath(row.path, folder), mask=mask, split=split)
