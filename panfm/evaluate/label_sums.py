"""A site's part of the federated ridge probe: sums over its labelled patients, and nothing of a single one.

    first message up     per task: n, sum x, sum x x', sum y, sum x y', sum y^2          float64
    message down         the ridge path of all sites together (`RidgePath`)
    second message up    per task: summed squared leave-one-out errors per penalty       float64 [P, C]

A task is one or more labels, of which a patient knows all or is left out. Both answers are functions of the site's own
features and labels, and are all that leaves. Needs numpy alone.

Sums of few patients show them. So a class of a task with fewer patients at the site than its floor is left out, and a
task with fewer patients in all. Since sums of several tasks can be combined, a task is withheld if membership and
classes of all tasks up to it would tell a group of fewer patients than the floor from all others; whole numbers of at
most ten values are classes. Of other numbers, one that is the same for all but few patients is withheld. An outlier in
a number still dominates its sums. Sums are not differentially private, and no private run gives any.

Shape legend: N patients, D features, C labels of a task, P penalties, R axes kept.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from panfm.errors import ProtocolError

Floats = NDArray[np.float64]
Targets = Mapping[str, Floats]
"""Task -> label values [N, C], NaN where unknown."""

PENALTIES = np.logspace(-1, 5, 13)
"""Ridge penalties that are tried, in units of standardised features; none is favoured."""
MAX_FEATURES = 4096


@dataclass(frozen=True)
class LabelSums:
    """Sums over the patients of one task at one site, or at several together."""

    count: Floats
    """[], number of patients."""
    x: Floats
    """[D]"""
    xx: Floats
    """[D, D]"""
    y: Floats
    """[C]"""
    xy: Floats
    """[D, C]"""
    yy: Floats
    """[C], sums of squares."""

    @classmethod
    def of(cls, features: NDArray[np.floating], targets: Floats) -> Self:
        """Sum over patients with features [N, D] and targets [N, C]."""
        x, y = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
        return cls(np.array(float(len(x))), x.sum(axis=0), x.T @ x, y.sum(axis=0), x.T @ y, (y**2).sum(axis=0))

    def __add__(self, other: Self) -> Self:
        """Add the sums of other patients."""
        return type(self)(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def to_arrays(self) -> dict[str, Floats]:
        """Convert to the arrays of a message."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]], *, features: int, labels: int) -> Self:
        """Read a site's message.

        Raises:
            ProtocolError: an array is missing, of another shape or type or not finite, or no patients have such sums.
        """
        d, c = features, labels
        shapes = {"count": (), "x": (d,), "xx": (d, d), "y": (c,), "xy": (d, c), "yy": (c,)}
        sums = cls(**checked_arrays(arrays, shapes))
        sums._check_possible()
        return sums

    def _check_possible(self) -> None:
        """Raise ProtocolError for sums that no patients have."""
        count, squares = float(self.count), self.xx.diagonal()
        if not (1 <= count <= 1e9 and count == round(count)):
            raise ProtocolError(f"label sums: count is {count:g}, expected a number of patients")
        if not ((squares <= count * _LARGEST_SQUARE).all() and (self.yy <= count * _LARGEST_SQUARE**2).all()):
            raise ProtocolError("label sums: found squares beyond all measure")
        largest = np.sqrt(np.outer(squares.clip(min=0), self.yy.clip(min=0)))
        is_possible = (
            np.allclose(self.xx, self.xx.T, rtol=1e-9, atol=1e-12 * max(squares.max(initial=0.0), 1e-300))
            and (squares >= 0).all()
            and (np.abs(self.xx) <= np.sqrt(np.outer(squares, squares)) * _ROUNDING).all()
            and (self.x**2 <= count * squares * _ROUNDING).all()
            and (self.y**2 <= count * self.yy * _ROUNDING).all()
            and (np.abs(self.xy) <= largest * _ROUNDING).all()
        )
        if not (is_possible and self._is_gram_matrix()):
            raise ProtocolError("label sums: found sums and sums of products that no patients have together")

    def _is_gram_matrix(self) -> bool:
        """Whether the products of ones, features and each label can be those of patients: no negative square."""
        products = np.block([[self.count.reshape(1, 1), self.x[None]], [self.x[:, None], self.xx]])
        scale = np.sqrt(products.diagonal())
        scale[scale == 0] = 1.0
        with_labels = np.vstack([self.y, self.xy]) / scale[:, None] / np.sqrt(np.where(self.yy > 0, self.yy, 1.0))
        try:
            values, axes = np.linalg.eigh(products / np.outer(scale, scale))
        except np.linalg.LinAlgError:
            return False
        if not np.isfinite(values).all() or values[0] < -_ROUNDED * values[-1]:
            return False
        along = (axes.T @ with_labels) ** 2
        has_axis = values > _ROUNDED * values[-1]
        explained = (along[has_axis] / values[has_axis, None]).sum(axis=0)
        return bool((explained <= 1 + 1e-3).all() and (along[~has_axis].sum(axis=0) <= 1e-4).all())


_ROUNDING = 1 + 1e-9
_ROUNDED = 1e-9
"""Eigenvalues below this share of the largest are rounding."""
_LARGEST_SQUARE = 1e12
"""Mean square of a feature; of a label its square."""


@dataclass(frozen=True)
class RidgePath:
    """Ridge regressions of one task under every penalty, as the server tells them to the sites.

    The prediction under penalty p is target_mean + slopes' (z / (eigenvalues + p)), z = axes' (x - centre) / scale.
    """

    count: Floats
    """[], patients of all sites."""
    centre: Floats
    """[D]"""
    scale: Floats
    """[D], > 0."""
    axes: Floats
    """[D, R], eigenvectors of the standardised features' scatter."""
    eigenvalues: Floats
    """[R], > 0."""
    slopes: Floats
    """[R, C], standardised features times targets, along the axes."""
    target_mean: Floats
    """[C]"""

    def to_arrays(self) -> dict[str, Floats]:
        """Convert to the arrays of a message."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]], *, features: int, labels: int) -> Self:
        """Read the server's message.

        Raises:
            ProtocolError: an array is missing, of another shape or type, not finite, or out of its range.
        """
        d, c, r = features, labels, arrays.get("eigenvalues", np.empty(0)).size
        shapes = {"count": (), "centre": (d,), "scale": (d,), "axes": (d, r), "eigenvalues": (r,), "slopes": (r, c)}
        if r > d:
            raise ProtocolError(f"ridge path: found {r} axes of {d} features")
        path = cls(**checked_arrays(arrays, shapes | {"target_mean": (c,)}))
        if not (path.count >= 1 and (path.scale > 0).all() and (path.eigenvalues > 0).all()):
            raise ProtocolError("ridge path: expected count, scale and eigenvalues above 0")
        return path

    def predictions(self, features: NDArray[np.floating]) -> Floats:
        """Predictions [P, N, C] of features [N, D] under every penalty."""
        z = self._along_axes(features)
        return np.stack([self.target_mean + (z / (self.eigenvalues + penalty)) @ self.slopes for penalty in PENALTIES])

    def leverages(self, features: NDArray[np.floating]) -> Floats:
        """Weight [P, N] of each fit patient's own target in its prediction; below 1."""
        squares = self._along_axes(features) ** 2
        shares = [(squares / (self.eigenvalues + penalty)).sum(axis=1) for penalty in PENALTIES]
        return np.stack(shares) + 1 / self.count

    def _along_axes(self, features: NDArray[np.floating]) -> Floats:
        rows: Floats = (np.asarray(features, dtype=np.float64) - self.centre) / self.scale @ self.axes
        return rows


@dataclass(frozen=True)
class SiteSums:
    """First answer of a site: the sums of every task that it contributes to."""

    tasks: Mapping[str, LabelSums]
    withheld: tuple[str, ...]
    """One line per task, or class of a task, that too few patients stand behind."""


def site_sums(features: NDArray[np.floating], targets: Targets, *, floor: int) -> SiteSums:
    """Sum over a site's labelled patients.

    Args:
        features: [N, D], of the frozen model that all sites have.
        targets: Of every task.
        floor: Fewest patients behind a sum, `limits.smallest-batch`; 1 is no floor.
    """
    rows, notes = contributing_rows(targets, floor)
    return SiteSums({task: LabelSums.of(features[at], targets[task][at]) for task, at in rows.items()}, tuple(notes))


def site_errors(
    features: NDArray[np.floating], targets: Targets, paths: Mapping[str, RidgePath], *, floor: int
) -> dict[str, Floats]:
    """Second answer of a site: summed squared leave-one-out errors [P, C] of its patients, by task.

    The error of a patient whom a ridge regression has not seen is its residual over 1 - leverage; the intercept is not
    penalised, and standardisation is by all patients.

    Raises:
        ProtocolError: a leverage is not below 1: the path is not of sums that this site's patients are in.
    """
    errors = {}
    for task, at in contributing_rows(targets, floor)[0].items():
        if task not in paths:
            continue
        rest = 1 - paths[task].leverages(features[at])
        if not (rest > 0).all():
            raise ProtocolError(f"ridge path of {task!r}: found a leverage of 1 or more, expected the path of its sums")
        residuals = (targets[task][at] - paths[task].predictions(features[at])) / rest[:, :, None]
        errors[task] = (residuals**2).sum(axis=1)
    return errors


def contributing_rows(targets: Targets, floor: int) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Return the patients behind the sums of each task, and one line for each task or class that is withheld."""
    rows: dict[str, NDArray[np.int64]] = {}
    notes: list[str] = []
    for task, values in targets.items():
        at = np.flatnonzero(np.isfinite(values).all(axis=1))
        kept = _without_small_classes(values[at], floor)
        if kept.any() and not kept.all():
            notes.append(f"{task}: patients of a class with fewer than {floor} patients are left out")
        at = at[kept]
        if reason := _reason_to_withhold(targets, rows, task, at, floor):
            notes.append(f"{task}: nothing is given, {reason}")
        else:
            rows[task] = at
    return rows, notes


def _reason_to_withhold(
    targets: Targets, accepted: Mapping[str, NDArray[np.int64]], task: str, at: NDArray[np.int64], floor: int
) -> str:
    """Why the sums of a task over some patients would show fewer than the floor; empty if they do not."""
    if len(at) < max(floor, 1):
        return f"fewer than {floor} labelled patients"
    if floor <= 1:
        return ""
    numbers = [column for column in targets[task][at].T if not _is_class(column)]
    if any(0 < _off_the_most_common(column) < floor for column in numbers):
        return f"a number is the same for all but fewer than {floor} patients"
    before = [column for name, those in accepted.items() for column in _on(targets[name], those)]
    others = [column for column in before if not _is_class(column)]
    for column, other in itertools.product(_on(targets[task], at), others):
        both = np.isfinite(column) & np.isfinite(other)
        if not _is_class(column) and 0 < _off_the_most_common((column - other)[both]) < floor:
            return f"a number differs from another task's for fewer than {floor} patients"
    tasks = {**accepted, task: at}
    told = np.hstack([_partition(targets[name], those) for name, those in tasks.items()])
    _, sizes = np.unique(told[np.unique(np.concatenate(list(tasks.values())))], axis=0, return_counts=True)
    if sizes.min() < floor:
        return f"together with the tasks before it, it tells fewer than {floor} patients from all others"
    return ""


_MOST_CLASSES = 10
"""Different whole numbers that a column of classes has at most."""


def _is_class(column: Floats) -> bool:
    """Whether the known values of a column are classes rather than numbers."""
    known = column[np.isfinite(column)]
    values = np.unique(known)
    return 2 * len(values) <= len(known) and len(values) <= _MOST_CLASSES and bool((values == np.round(values)).all())


def _off_the_most_common(column: Floats) -> int:
    return len(column) - int(np.unique(column, return_counts=True)[1].max(initial=0))


def _on(values: Floats, at: NDArray[np.int64]) -> list[Floats]:
    """Columns [N] of a task, NaN for patients that are not behind its sums."""
    masked = np.full(values.shape, np.nan)
    masked[at] = values[at]
    return list(masked.T)


def _partition(values: Floats, at: NDArray[np.int64]) -> Floats:
    """What sums of a task tell of every patient [N, 1 + classes]: whether it is behind them, and its classes."""
    classes = [column for column in _on(values, at) if _is_class(column)]
    behind = np.isin(np.arange(len(values)), at)
    return np.column_stack([behind, *(np.where(behind, column, -1.0) for column in classes)]).astype(np.float64)


def _without_small_classes(values: Floats, floor: int) -> NDArray[np.bool_]:
    """Which patients [N] show classes together that enough others show."""
    classes = [column for column in values.T if _is_class(column)]
    if floor <= 1 or not len(values) or not classes:
        return np.ones(len(values), dtype=bool)
    _, of_patient, sizes = np.unique(np.column_stack(classes), axis=0, return_inverse=True, return_counts=True)
    is_enough: NDArray[np.bool_] = (sizes >= floor)[of_patient.reshape(-1)]
    return is_enough


def checked_arrays(
    arrays: Mapping[str, NDArray[np.generic]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Floats]:
    """The arrays of a message, in their shapes; they may have come flat.

    Raises:
        ProtocolError: one is missing, not expected, not finite float64, or of another shape.
    """
    if arrays.keys() != shapes.keys():
        raise ProtocolError(f"message: found arrays {sorted(arrays)}, expected {sorted(shapes)}")
    checked = {}
    for name, shape in shapes.items():
        array = arrays[name]
        if array.dtype != np.float64 or array.shape not in (shape, (math.prod(shape),)):
            raise ProtocolError(f"message: {name} is {array.dtype} {list(array.shape)}, expected float64 {list(shape)}")
        checked[name] = array.astype(np.float64, copy=False).reshape(shape)
        if not np.isfinite(checked[name]).all():
            raise ProtocolError(f"message: {name} holds NaN or inf, expected finite numbers")
    return checked
