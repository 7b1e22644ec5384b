"""Reads the labels of a run's `[task]` at one place; patients whose label is not known leave the training split.

Cells are compared as `panfm probe` compares them: case, zero-width characters and the spelling of numbers tell no
classes apart, and `labels.toml` may name further cells that mean "not known". Classes are those of the description, so
that all sites have the same: a cell that is none of them is a fault. In a private run such a cell counts as not known
instead, because a refusal would tell the server of one patient.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panfm.cells import plain_cell, plain_number
from panfm.config import RunConfig, SiteConfig, load_site
from panfm.config.task import TaskConfig
from panfm.data.cache import open_store
from panfm.data.label_kinds import UNKNOWN, LabelRule, read_rules
from panfm.data.labels import LabelTable, read_site_cells
from panfm.data.store import ImageStore
from panfm.data.subjects import subject_key
from panfm.errors import LimitError

UNLABELLED = "unlabelled"
"""Split of patients whose label is not known."""
_FARTHEST = 1e6
"""Largest distance of a number from the centre of its task, in scales."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskLabels:
    """Labels of one table, by patient."""

    by_subject: Mapping[str, NDArray[np.float32]]
    """`subject_key` -> values [K] of the patients whose label is known."""
    fault: str
    """The first cell that is none of the task's, as a line; empty if there is none."""

    def of(self, subjects: tuple[str, ...], outputs: int) -> NDArray[np.float32]:
        """Values [subjects, outputs]; NaN where unknown."""
        unknown = np.full(outputs, np.nan, dtype=np.float32)
        rows = [self.by_subject.get(subject_key(subject), unknown) for subject in subjects]
        return np.stack(rows) if rows else np.empty((0, outputs), dtype=np.float32)


def open_training_store(folder: Path, run: RunConfig) -> ImageStore:
    """Open the images of a site folder for the training of a run: with the labels of its task, if it has one, of the
    patients who train in the federation.

    Raises:
        PanfmError: as `open_store` and `with_task_labels`.
    """
    store = open_store(folder, run.streams)
    if run.task is None:
        return store
    site = load_site(folder)
    smallest_class = site.limits.smallest_batch if run.patient_dp is None else 1
    return with_task_labels(store, folder, site, run, smallest_class=smallest_class)


def with_task_labels(
    store: ImageStore, folder: Path, site: SiteConfig, run: RunConfig, *, smallest_class: int = 1
) -> ImageStore:
    """Add the labels of a run's task to a store; patients without a label leave their split.

    Args:
        smallest_class: Fewest training patients of a class; those of a smaller class do not train, since the head's
            update of their class would be of them alone.
    Raises:
        LimitError: the site has no such label, reads the column otherwise, has cells that are none of the task's
            classes (unless the run is private), or knows the label of no training patient.
        DataError: the label table is not valid.
    """
    assert run.task is not None
    labels = read_task_labels(folder, site, run.task)
    if labels.fault and run.patient_dp is None:
        raise LimitError(
            labels.fault, public=f"task.label: {run.task.label}: this site has other values than the run's"
        )
    values = labels.of(store.subjects, len(run.task.outputs))
    is_known: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=1))
    train: NDArray[np.bool_] = np.isin(np.arange(len(values)), store.indices("train"))
    if run.task.kind != "number" and smallest_class > 1:
        is_known = is_known & ~_is_rare(values, is_known & train, smallest_class)
    pairs = zip(store.splits, is_known.tolist(), strict=True)
    labelled = replace(store, splits=tuple(split if known else UNLABELLED for split, known in pairs), labels=values)
    num_known = int((is_known & train).sum())
    if num_known == 0:
        raise LimitError.of_question(f"task.label: {run.task.label}: known of too few training patients of this site")
    if num_known < train.sum():
        given = f"{train.sum() - num_known} of {train.sum()} training patients of site {site.name}"
        rare = f" or are of a class with fewer than {smallest_class}" if smallest_class > 1 else ""
        logger.warning("task: %s have no %s%s: they do not train", given, run.task.label, rare)
    return labelled


def _is_rare(values: NDArray[np.float32], counts: NDArray[np.bool_], fewest: int) -> NDArray[np.bool_]:
    """Mark the patients [N] whose class fewer than `fewest` of the patients in `counts` have."""
    classes = values[:, 0] if values.shape[1] == 1 else values.argmax(axis=1)
    sizes = {value: int((counts & (classes == value)).sum()) for value in np.unique(classes[np.isfinite(classes)])}
    return np.array([sizes.get(value, 0) < fewest for value in classes], dtype=bool)


def read_task_labels(folder: Path, site: SiteConfig, task: TaskConfig) -> TaskLabels:
    """Read a task's column of a site's label table.

    Raises:
        LimitError: there is no table or no such column, or `labels.toml` gives the column another kind.
        DataError: the table is not valid.
    """
    where = f"task.label: {task.label}"
    if site.labels is None:
        raise LimitError.of_question(f"{where}: this site has no label table")
    table = read_site_cells(folder, site)
    if task.label not in table.cells:
        raise LimitError.of_question(f"{where}: no column of this site's label table")
    rule = read_rules([table]).get(task.label, LabelRule())
    if rule.kind not in (None, task.kind):
        raise LimitError(
            f"{where}: labels.toml reads this column as {rule.kind}, the run as {task.kind}",
            public=f"{where}: this site reads the column otherwise than the run",
        )
    classes = {plain_cell(name) for name in task.cells}
    return _of_column(table, task, (UNKNOWN - classes) | {plain_cell(cell) for cell in rule.unknown or ()})


def _of_column(table: LabelTable, task: TaskConfig, unknown: frozenset[str]) -> TaskLabels:
    known, fault = {}, ""
    for subject, line, cell in zip(table.subjects, table.lines, table.cells[task.label], strict=True):
        if (plain := plain_cell(cell)) in unknown:
            continue
        if (value := _value(plain, task)) is not None:
            known[subject_key(subject)] = value
        elif not fault:
            expected = ", ".join(task.cells) or f"a number within {_FARTHEST:g} scales of {task.centre:g}"
            fault = f"{table.path}:{line}: {task.label}: found {cell!r:.60}, expected {expected}, or nothing"
    return TaskLabels(known, fault)


def _value(plain: str, task: TaskConfig) -> NDArray[np.float32] | None:
    """Values [K] of a cell, in the units of the task's loss; None if it is none of the task's."""
    if task.kind == "number":
        assert task.centre is not None
        assert task.scale is not None
        number = plain_number(plain)
        distance = np.inf if number is None else (number - task.centre) / task.scale
        return np.array([distance], dtype=np.float32) if abs(distance) <= _FARTHEST else None
    classes = [plain_cell(name) for name in task.cells]
    if plain not in classes:
        return None
    at = classes.index(plain)
    return np.array([at] if task.kind == "yes-no" else np.arange(len(classes)) == at, dtype=np.float32)
