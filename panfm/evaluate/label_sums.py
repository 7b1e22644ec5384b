"""A site's part of the federated ridge probe: sums over its labelled patients, and nothing of a single one.

    first message up     per task: n, sum x, sum x x', sum y, sum x y', sum y^2          float64
    message down         the ridge path of all sites together (`RidgePath`)
    second message up    per task: summed squared leave-one-out errors per penalty       float64 [P, C]

A task is one or more labels, of which a patient knows all or is left out. Both answers are functions of the site's own
features and labels, and are all that leaves. Needs numpy alone.

Sums of few patients show them. So a class of a task with fewer patients at the site than its floor is left out, and a
task with fewer patients in all; and since the sums of two tasks can be subtracted, so is a task whose patients differ
from an earlier one's by fewer. This does not cover other combinations of three or more tasks, nor runs on changed data;
sums are not differentially private, and no private run gives any.

Shape legend: N patients, D features, C labels of a task, P penalties, R axes kept.
"""

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
        largest = np.sqrt(np.outer(squares.clip(min=0), self.yy.clip(min=0)))
        is_possible = (
            np.allclose(self.xx, self.xx.T, rtol=1e-9, atol=1e-12 * max(squares.max(initial=0.0), 1e-300))
            and (squares >= 0).all()
            and (self.x**2 <= count * squares * _ROUNDING).all()
            and (self.y**2 <= count * self.yy * _ROUNDING).all()
            and (np.abs(self.xy) <= largest * _ROUNDING).all()
        )
        if not is_possible:
            raise ProtocolError("label sums: found sums and sums of products that no patients have together")


_ROUNDING = 1 + 1e-9


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
        if len(at) < max(floor, 1):
            notes.append(f"{task}: nothing is given, fewer than {floor} labelled patients")
        elif near := [other for other, those in rows.items() if 0 < len(np.setxor1d(at, those)) < floor]:
            notes.append(f"{task}: nothing is given, its patients differ from those of {near[0]} by fewer than {floor}")
        else:
            rows[task] = at
    return rows, notes


def _without_small_classes(values: Floats, floor: int) -> NDArray[np.bool_]:
    """Which patients [N] show a class that enough others show; all of them where the targets are not 0 and 1."""
    if floor <= 1 or not len(values) or not np.isin(values, (0.0, 1.0)).all():
        return np.ones(len(values), dtype=bool)
    _, of_patient, sizes = np.unique(values, axis=0, return_inverse=True, return_counts=True)
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
