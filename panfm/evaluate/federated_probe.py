"""The server's part of the federated ridge probe: one probe of all sites' labels from summed statistics.

Equal to a ridge regression on everybody's features in one place: standardised by the mean and deviation of all patients
of the task, intercept not penalised, one penalty for the labels of a task, the one with the least leave-one-out error.
The sites' part, and the messages, are in `label_sums.py`.

    A = (sum x x' - n m m') / s s' = V diag(e) V'       w_p = V (V' b) / (e + p),   b = (sum x y' - n m ybar') / s

The gate of a run (server/round_gate.py) has no second message: its error comes from the sums alone, by generalised
cross-validation (Golub, Heath and Wahba 1979), which puts the mean leverage in the place of each patient's.

    n |y - H_p y|^2 / (n - tr H_p)^2 / variance
    |y - H_p y|^2 = |y - ybar|^2 - sum_r (V' b)_r^2 (e_r + 2 p) / (e_r + p)^2

The same sums give a linear discriminant analysis of each yes/no label: class means, and the covariance about them,
which is the scatter less what lies between the means. With d = m1 - m0, k = n1 n0 / n, and a share g of shrinkage
towards the mean v of the D variances within classes,

    C = (1 - g) (A - k d d') / n + g v I,   w = C^-1 d,   b = log(n1 / n0) - (m1 + m0)' w / 2

For two classes w has the direction of the ridge regression under the penalty n g v / (1 - g); its scores are log-odds.

Shape legend: D features, C labels of a task, P penalties.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import numpy as np
from numpy.typing import NDArray

from panfm.errors import ProtocolError
from panfm.evaluate.label_sums import (
    MAX_FEATURES,
    PENALTIES,
    LabelSums,
    RidgePath,
    Targets,
    checked_arrays,
    site_errors,
    site_sums,
)
from panfm.evaluate.probe_file import LinearProbe

_NO_VARIANCE = 1e-12
"""Share of a feature's mean square below which its variance is rounding: the feature is constant."""
_SINGULAR = 1e-9
"""Least share of the variance along a discriminant that lies within the classes; below it, features separate the
classes and there is no solution."""
_NEGATIVE = 1e-8
"""Share of the largest eigenvalue by which rounding may make one negative."""


def ridge_path(sums: Sequence[LabelSums]) -> RidgePath:
    """Add the sums of the sites and solve the ridge regression under every penalty.

    Raises:
        ProtocolError: no site gave sums, there are more than MAX_FEATURES features, or the sums are of no patients.
    """
    if not sums or len(sums[0].x) > MAX_FEATURES:
        raise ProtocolError(f"label sums: expected some site's, of at most {MAX_FEATURES} features")
    total = reduce(add, sums)
    count = float(total.count)
    centre, target_mean = total.x / count, total.y / count
    mean_square = total.xx.diagonal() / count
    variance = mean_square - centre**2
    varies = variance > _NO_VARIANCE * mean_square
    scale = np.sqrt(np.where(varies, variance, 1.0))
    scatter = (total.xx - count * np.outer(centre, centre)) / np.outer(scale, scale)
    scatter[~varies], scatter[:, ~varies] = 0.0, 0.0
    products = (total.xy - count * np.outer(centre, target_mean)) / scale[:, None]
    products[~varies] = 0.0
    try:
        eigenvalues, axes = np.linalg.eigh(scatter)
    except np.linalg.LinAlgError as error:
        raise ProtocolError("label sums: found a scatter without eigenvalues, which no patients have") from error
    largest = max(float(eigenvalues[-1]), 0.0)
    if float(eigenvalues[0]) < -_NEGATIVE * max(largest, 1.0):
        raise ProtocolError("label sums: found a scatter with a negative eigenvalue, which no patients have")
    kept = eigenvalues > largest * len(eigenvalues) * np.finfo(np.float64).eps
    axes = axes[:, kept]
    return RidgePath(np.array(count), centre, scale, axes, eigenvalues[kept], axes.T @ products, target_mean)


def cross_validated_error(sums: Sequence[LabelSums]) -> float:
    """Error of the ridge regression on all sites' patients by generalised cross-validation, under the best penalty.

    Returns:
        Mean over the labels of the mean squared error over the label's variance: 1 is no better than the mean. NaN if
        no label varies.
    Raises:
        ProtocolError: as `ridge_path`.
    """
    path, total = ridge_path(sums), reduce(add, sums)
    count = float(path.count)
    spread = total.yy - count * path.target_mean**2
    varies = spread > _NO_VARIANCE * total.yy
    if not varies.any():
        return float("nan")
    damped = path.eigenvalues + PENALTIES[:, None]
    free = count - 1 - (path.eigenvalues / damped).sum(axis=1)
    explained = ((path.eigenvalues + 2 * PENALTIES[:, None]) / damped**2) @ path.slopes[:, varies] ** 2
    residual = (spread[varies] - explained).clip(min=0.0)
    errors = count**2 * residual / spread[varies] / free[:, None] ** 2
    return float(errors.mean(axis=1).min())


def choose_penalty(path: RidgePath, errors: Sequence[Mapping[str, NDArray[np.generic]]]) -> tuple[LinearProbe, float]:
    """Add the leave-one-out errors of the sites and take the penalty with the least, the strongest of equals.

    Args:
        errors: Messages of the sites, each one array `errors` [P, C].
    Returns:
        The probe, and its penalty.
    Raises:
        ProtocolError: a message does not hold.
    """
    shape = (len(PENALTIES), len(path.target_mean))
    summed = np.zeros(shape)
    for message in errors:
        given = checked_arrays(message, {"errors": shape})["errors"]
        if (given < 0).any():
            raise ProtocolError("leave-one-out errors: found a negative sum of squares")
        summed += given
    least = summed.sum(axis=1)
    penalty = float(PENALTIES[len(least) - 1 - int(least[::-1].argmin())])
    weights = path.axes @ (path.slopes / (path.eigenvalues + penalty)[:, None])
    return LinearProbe(path.centre, path.scale, weights, path.target_mean), penalty


def discriminants(path: RidgePath, total: LabelSums, shrinkage: float) -> LinearProbe:
    """Solve a linear discriminant analysis of each yes/no label of a task, from the sums of all sites.

    Equal to scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=...)` on the standardised features of
    all patients.

    Args:
        path: Of these sums.
        total: Sums of all sites.
        shrinkage: Share of the covariance, 0 to 1, that the mean variance replaces; without, classes that features
            separate without error have no solution.
    Returns:
        The probe, with log-odds as scores; a label that is not 0 and 1, of one class, or without a solution has none.
    """
    count, ones = float(total.count), total.y
    zeros = count - ones
    is_class = (total.yy == ones) & (ones == np.round(ones)) & (ones > 0) & (zeros > 0)
    between = np.where(is_class, ones * zeros / count, np.nan)
    difference = path.slopes / between
    pooled = (path.eigenvalues.sum() - between * (difference**2).sum(axis=0)) / count / len(path.centre)
    share = (1 - shrinkage) / count
    with np.errstate(divide="ignore", invalid="ignore"):
        solved = difference / (share * path.eigenvalues[:, None] + shrinkage * pooled)
        along = (difference * solved).sum(axis=0)
        rest = 1 - share * between * along
        has_solution = np.isfinite(along) & (rest > _SINGULAR)
        weights = path.axes @ np.where(has_solution, solved / rest, 0.0)
        bias = np.log(ones / zeros) - (zeros - ones) / (2 * count) * along / rest
    return LinearProbe(path.centre, path.scale, weights, np.where(has_solution, bias, np.nan))


@dataclass(frozen=True)
class LabelledSite:
    """Features and labels of one site's patients, and its floor."""

    name: str
    features: NDArray[np.floating]
    """[N, D]"""
    targets: Targets
    floor: int
    """`limits.smallest-batch` of the site."""


@dataclass(frozen=True)
class FederatedProbes:
    """Probes of all tasks, and what sites withheld."""

    probes: Mapping[str, LinearProbe]
    """Task -> its probe; without tasks to which no site contributed."""
    withheld: Mapping[str, tuple[str, ...]]
    """Site -> one line for each task, or class of a task, that it gave nothing of."""


def probe_together(sites: Sequence[LabelledSite]) -> FederatedProbes:
    """Fit the probes of all tasks, by the two messages of every site.

    Raises:
        ProtocolError: a message does not hold.
    """
    answers = [site_sums(site.features, site.targets, floor=site.floor) for site in sites]
    paths = {}
    sizes = {task: values.shape[1] for site in sites for task, values in site.targets.items()}
    for task, labels in sizes.items():
        messages = [answer.tasks[task].to_arrays() for answer in answers if task in answer.tasks]
        read = partial(LabelSums.from_arrays, features=sites[0].features.shape[1], labels=labels)
        if messages:
            paths[task] = ridge_path([read(message) for message in messages])
    errors = [site_errors(site.features, site.targets, paths, floor=site.floor) for site in sites]
    probes = {
        task: choose_penalty(path, [{"errors": given[task]} for given in errors if task in given])[0]
        for task, path in paths.items()
    }
    withheld = {site.name: answer.withheld for site, answer in zip(sites, answers, strict=True) if answer.withheld}
    return FederatedProbes(probes, withheld)
