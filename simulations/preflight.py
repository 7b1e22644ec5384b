"""Checks before the first round of a simulation: who takes part, what is left out, and what the last step needs.

Manifests and label tables are read, images are not. What would make the run fail is an error; what is left out is a
line for people, with names.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from panfm.config import Releasable, RunConfig, SiteConfig, load_site, site_folders
from panfm.config.task import TaskConfig
from panfm.data.joins import counted
from panfm.data.label_kinds import encode
from panfm.data.labels import Labels, read_labels, read_site_cells
from panfm.data.manifest import Row, read_manifest
from panfm.data.subjects import subject_key
from panfm.data.task_labels import TaskLabels, read_task_labels
from panfm.errors import ConfigError, DataError, LimitError, RunError
from panfm.evaluate.linear_probe import MIN_SUBJECTS
from panfm.evaluate.probe_labels import Unmatched
from panfm.models.sizes import sizes_of
from panfm.planning.plan import too_few_to_train
from panfm.site.admission import check_labels
from server.tracking_config import tracking_of
from simulations.cohorts.cohort_labels import CohortLabels, read_cohort_labels
from simulations.cohorts.cohort_source import require_site

_MOST_NAMED = 3


@dataclass(frozen=True)
class _Place:
    """A site, or the held-out subjects, as its files tell it."""

    folder: Path
    site: SiteConfig
    rows: Sequence[Row]
    """Of the run's streams."""
    left_out: Mapping[str, int]
    """Stream that the run does not have -> images."""

    @classmethod
    def read(cls, folder: Path, run: RunConfig) -> "_Place":
        site = load_site(folder)
        rows = read_manifest(folder, site)
        left_out = Counter(row.stream for row in rows if row.stream not in run.streams)
        return cls(folder, site, [row for row in rows if row.stream in run.streams], left_out)

    @property
    def splits(self) -> dict[str, str]:
        """Subject -> split."""
        return {row.subject: row.split for row in self.rows}

    def counts(self) -> str:
        """Number of subjects in each split, as text such as `12 in train, 4 in test`."""
        return ", ".join(f"{count} in {split}" for split, count in Counter(self.splits.values()).items())

    def in_split(self, split: str) -> list[str]:
        """Subjects of a split."""
        return [subject for subject, own in self.splits.items() if own == split]


def check_before(run: RunConfig, cohort: Path) -> list[str]:
    """Check a cohort's folder against the run.

    Returns:
        One line for each kind of thing that is left out.
    Raises:
        PanfmError: the run would fail, at once or after its last round; the line says what to write instead.
    """
    sites = [_Place.read(folder.resolve(), run) for folder in site_folders(cohort / "sites")]
    _check_number_of_sites(run, sites)
    lines = [line for site in sites for line in _of_site(site, run)]
    lines += _too_small(run, sites)
    lines += [line for site in sites for line in _of_task_label(site, run)]
    at_sites = {row.stream for site in sites for row in site.rows}
    lines += [f"stream {name}: no site has images of it" for name in run.streams if name not in at_sites]
    lines += _of_probe_tasks(run, sites)
    if not (cohort / "holdout").is_dir():
        without = "not probed, and no image is logged" if tracking_of(run).images else "not probed"
        return [*lines, f"no hold-out: the model is {without}"]
    require_site(cohort / "holdout")
    holdout = _Place.read((cohort / "holdout").resolve(), run)
    return [*lines, *_of_holdout(holdout, run), *_of_labels(read_cohort_labels(cohort), sites, holdout)]


def check_disk(run: RunConfig, folder: Path, num_sites: int) -> None:
    """Raise RunError if the private states of all sites and the server's would not fit on the disk of a run folder."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    needed, free = (num_sites + 1) * sizes_of(run).kept_bytes, shutil.disk_usage(nearest).free
    if needed > free:
        raise RunError(
            f"{folder}: found {free / 2**30:.3g} GiB free, expected {needed / 2**30:.3g} for the sites' private states"
        )


def _check_number_of_sites(run: RunConfig, sites: Sequence[_Place]) -> None:
    names, least = [place.site.name for place in sites], run.federation.min_sites
    if len(sites) < least:
        given = f"{counted(len(sites), 'site')} ({', '.join(names)})"
        remedy = f"name more sites, or set federation.min-sites = {len(sites)}"
        raise ConfigError(f"federation.min-sites: {least}, found {given}; {remedy}")
    if run.site_dp and run.site_dp.num_sites != len(sites):
        raise ConfigError(f"site-dp.num-sites: {run.site_dp.num_sites}, found {len(sites)} sites ({', '.join(names)})")


def _too_small(run: RunConfig, sites: Sequence[_Place]) -> list[str]:
    """A line for each site below its own floor. Raises DataError with them if too few others are left."""
    if run.patient_dp:
        return []
    reasons = {place.site.name: too_few_to_train(place.site, len(place.in_split("train"))) for place in sites}
    lines = [f"site {name}: {reason}" for name, reason in reasons.items() if reason]
    if len(sites) - len(lines) < run.federation.min_sites:
        raise DataError("\n".join(lines))
    return lines


def _of_site(place: _Place, run: RunConfig) -> Iterator[str]:
    where = f"site {place.site.name}"
    if not place.rows:
        streams = ", ".join(place.left_out)
        raise DataError(f"{where}: has images of {streams} only, expected one of the run's: {', '.join(run.streams)}")
    if not place.in_split("train"):
        raise DataError(
            f"{where}: no subject in split train, found {place.counts()}; write split train in {_manifest(place)}"
        )
    yield from _unused_streams(where, place)
    if others := place.in_split("test"):
        yield f"{where}: {_named(others)} in split test: left out, a site trains on train and validates on val"


def _of_task_label(place: _Place, run: RunConfig) -> Iterator[str]:
    """Yield a line on the training patients of a site without the label of the run's task. Raises LimitError, with the
    site's name: it cannot learn the task."""
    if run.task is None:
        return
    where = f"site {place.site.name}"
    try:
        check_labels(run.task, place.site.limits)
    except LimitError as error:
        raise LimitError(f"{where}: {error}") from error
    labels = _task_labels(where, place, run.task)
    train = place.in_split("train")
    if missing := sum(subject_key(subject) not in labels.by_subject for subject in train):
        yield f"{where}: {missing} of {len(train)} training patients have no {run.task.label} and do not train"


def _task_labels(where: str, place: _Place, task: TaskConfig) -> TaskLabels:
    """Read the labels of a task at a place. Raises LimitError: there are none, or a cell is none of the task's."""
    try:
        labels = read_task_labels(place.folder, place.site, task)
    except LimitError as error:
        raise LimitError(f"{where}: {error}") from error
    if labels.fault:
        raise LimitError(f"{where}: {labels.fault}")
    return labels


def _of_holdout(place: _Place, run: RunConfig) -> Iterator[str]:
    if not place.in_split("test"):
        counts = place.counts()
        given = (
            f"{counts} of the run's streams" if counts else f"no image of the run's streams {', '.join(run.streams)}"
        )
        raise DataError(f"hold-out: no subject in split test, found {given}; write split test in {_manifest(place)}")
    yield from _unused_streams("hold-out", place)
    if others := place.in_split("train"):
        yield f"hold-out: {_named(others)} in split train: probes are fitted on them as well, not tested"
    if others := place.in_split("val"):
        yield f"hold-out: {_named(others)} in split val: left out"
    if run.task is not None:
        tested, labels = place.in_split("test"), _task_labels("hold-out", place, run.task)
        if missing := sum(subject_key(subject) not in labels.by_subject for subject in tested):
            yield f"hold-out: {missing} of {len(tested)} test patients have no {run.task.label} and are not scored"


def _unused_streams(where: str, place: _Place) -> Iterator[str]:
    for stream, count in place.left_out.items():
        yield f"{where}: {counted(count, 'image')} of {stream}: left out, the run has no such stream"


def _of_probe_tasks(run: RunConfig, sites: Sequence[_Place]) -> Iterator[str]:
    """Compare the labels of `probe.tasks` with the sites' label tables. Raises ConfigError: no site has those of a
    task."""
    columns = {
        place.site.name: set(read_site_cells(place.folder, place.site).cells) if place.site.labels else set()
        for place in (sites if run.probe.tasks else ())
    }
    for task, labels in run.probe.tasks.items():
        having = [place.site for place in sites if columns[place.site.name].issuperset(labels)]
        if not having:
            known = ", ".join(sorted(set().union(*columns.values()))) or "no label"
            raise ConfigError(f"probe.tasks.{task}: no site has {', '.join(labels)}, found {known} in their labels.csv")
        if not any(Releasable.LABEL_SUMS in site.limits.may_leave for site in having):
            names = ", ".join(site.name for site in having)
            yield f"probe.tasks.{task}: not fitted, label-sums are not in limits.may-leave of site.toml of {names}"


def _of_labels(labels: CohortLabels, sites: Sequence[_Place], holdout: _Place) -> list[str]:
    """Read all label tables as the probes will, and return a line on each label that is left out. Raises DataError: no
    label of them could be probed."""
    told = list(labels.notes)
    known = {place.folder: _read(place, labels) for place in (*sites, holdout)}
    for place, table in ((place, known[place.folder]) for place in (*sites, holdout)):
        if table is not None:
            told += _unmatched(place, Unmatched.of(place.splits, table.subjects))
    if not labels.info and not told and not any(place.site.labels for place in (*sites, holdout)):
        return ["no labels.csv at any site or in the hold-out: the model is not probed"]
    if not labels.info:
        missing = f"{holdout.folder}: no label to probe"
        raise DataError(
            "\n".join([*told, f'{missing}, expected labels = "labels.csv" in site.toml of sites and hold-out'])
        )
    places = (*sites, holdout)
    fit = {
        name: sum(_labelled(place, known[place.folder], {name}, "train") for place in places) for name in labels.info
    }
    test = {name: _labelled(holdout, known[holdout.folder], {name}, "test") for name in labels.info}
    fit_subjects = sum(_labelled(place, known[place.folder], set(labels.info), "train") for place in places)
    if fit_subjects < MIN_SUBJECTS:
        few = f"labels: {fit_subjects} training subjects of the sites have any"
        raise DataError("\n".join([*told, f"{few}, expected at least {MIN_SUBJECTS} to probe"]))
    for name, info in labels.info.items():
        if not test[name] or not fit[name]:
            told.append(f"label {name}: {fit[name]} training and {test[name]} held-out subjects have it: is not told")
        elif len(values := _values(holdout, known[holdout.folder], name, "test")) == 1 and not info.is_number:
            told.append(f"label {name}: {values.pop():g} for all {test[name]} held-out subjects: its AUC is not told")
    return told


def _read(place: _Place, labels: CohortLabels) -> Labels | None:
    """A place's labels; None if it has none. Raises DataError if a label is none of its kind's values."""
    if place.site.labels is None:
        return None
    if labels.kinds is not None:
        return encode(read_site_cells(place.folder, place.site), labels.kinds)
    table = read_labels(place.folder, place.site)
    for column, name in enumerate(table.names):
        values = table.values[:, column]
        strange = values[np.isfinite(values) & ~np.isin(values, (0.0, 1.0))]
        if name in labels.info and not labels.info[name].is_number and len(strange):
            remedy = 'for a number write kind = "volume" in cohort.toml; for classes leave its [labels] out'
            raise DataError(
                f"{place.folder / place.site.labels}: {name}: found {strange[0]:g}, expected 0, 1 or nothing; {remedy}"
            )
    return table


def _unmatched(place: _Place, unmatched: Unmatched) -> Iterator[str]:
    where = f"{place.folder.name}/{place.site.labels}"
    if unmatched.without_row:
        yield f"{where}: {_named(unmatched.without_row)} with images without a row"
    if unmatched.without_images:
        yield f"{where}: {_named(unmatched.without_images)} with a row, but without an image of the run"


def _labelled(place: _Place, table: Labels | None, names: set[str], split: str) -> int:
    """Subjects of a split for whom any of some labels is known."""
    columns = [] if table is None else [column for column, name in enumerate(table.names) if name in names]
    if table is None or not columns:
        return 0
    wanted = {subject_key(subject) for subject in place.in_split(split)}
    known = np.isfinite(table.values[:, columns]).any(axis=1)
    return sum(subject_key(table.subjects[row]) in wanted for row in np.flatnonzero(known))


def _values(place: _Place, table: Labels | None, name: str, split: str) -> set[float]:
    """Set of the known values of a label in a split."""
    if table is None or name not in table.names:
        return set()
    wanted = {subject_key(subject) for subject in place.in_split(split)}
    column = table.values[:, table.names.index(name)]
    of_split = zip(table.subjects, column, strict=True)
    return {float(value) for subject, value in of_split if subject_key(subject) in wanted and np.isfinite(value)}


def _manifest(place: _Place) -> Path:
    return place.folder / place.site.manifest


def _named(subjects: Sequence[str]) -> str:
    """`12 subjects (a, b, c, ...)`."""
    names = ", ".join(subjects[:_MOST_NAMED]) + (", ..." if len(subjects) > _MOST_NAMED else "")
    return f"{counted(len(subjects), 'subject')} ({names})"
