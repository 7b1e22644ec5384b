"""Linear probes on frozen features: logistic regressions of yes/no labels, ridge regressions of numbers.

Features are standardised on the fit subjects. Yes/no labels: L2 logistic regression, one penalty for all labels, chosen
by mean AUC on a held-out third of the fit subjects. Numbers: ridge, penalty by closed-form leave-one-out. Unknown
labels (NaN) leave a subject out of that label alone.

No value among N subjects is further than sqrt(N - 1) standard deviations from their mean. A feature of another subject
that is further than sqrt(N) counts as sqrt(N): one that hardly varies among the fit subjects, such as a block of
background, could else outweigh all others.

Fitting keeps to one thread: the problems are small, and the bits
then do not depend on the machine's load.

Shape legend: N subjects, D features, L labels, R resamples.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.errors import DataError
from panfm.evaluate.label_sums import PENALTIES
from panfm.evaluate.probe_file import LinearProbe
from panfm.evaluate.scores import Floats, auc, r2
from panfm.extras import needs_extra
from panfm.seeds import numpy_generator

with needs_extra("evaluate"):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

Features = NDArray[np.floating]

MIN_SUBJECTS = 10
"""Fewer subjects than this tell nothing; a probe is refused."""
_INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0)
_NEWTON_UP_TO = 128
"""Features up to which Newton's method is the faster solver; both find the same optimum."""


def fit_classifiers(features: Features, targets: Floats, names: Sequence[str]) -> LinearProbe:
    """Logistic regressions of yes/no labels.

    Args:
        features: [N, D].
        targets: [N, L] of 0, 1 or NaN (unknown).
        names: L label names, for notes.
    Raises:
        DataError: fewer than MIN_SUBJECTS subjects, or a value that is neither 0 nor 1.
    """
    _check(features, targets, names)
    strange = np.isfinite(targets) & ~np.isin(targets, (0.0, 1.0))
    if strange.any():
        label = names[int(np.flatnonzero(strange.any(axis=0))[0])]
        raise DataError(f"label {label!r}: expected 0, 1 or empty (got {targets[strange][0]:g})")
    scaler = StandardScaler().fit(np.asarray(features, dtype=np.float64))
    standard = scaler.transform(np.asarray(features, dtype=np.float64))
    usable = [column for column in range(len(names)) if _has_both(targets[:, column])]
    inverse_penalty = _choose_inverse_penalty(standard, targets[:, usable])
    weights, bias = _logistic(standard, targets, usable, inverse_penalty)
    notes = [f"{name}: not probed, fit subjects are all of one class" for name in _others(names, usable)]
    return LinearProbe(scaler.mean_, scaler.scale_, weights, bias, tuple(notes), reach=math.sqrt(len(features)))


def fit_regressors(features: Features, targets: Floats, names: Sequence[str]) -> LinearProbe:
    """Ridge regressions of numbers; arguments and errors as in `fit_classifiers`, any finite target or NaN."""
    _check(features, targets, names)
    scaler = StandardScaler().fit(np.asarray(features, dtype=np.float64))
    standard = scaler.transform(np.asarray(features, dtype=np.float64))
    weights, bias = _nothing(standard, targets)
    usable = [column for column in range(len(names)) if np.isfinite(targets[:, column]).sum() >= MIN_SUBJECTS]
    for column in usable:
        known = np.isfinite(targets[:, column])
        centre, scale = targets[known, column].mean(), targets[known, column].std() or 1.0
        with threadpool_limits(limits=1):
            ridge = RidgeCV(alphas=PENALTIES).fit(standard[known], (targets[known, column] - centre) / scale)
        weights[:, column], bias[column] = ridge.coef_ * scale, ridge.intercept_ * scale + centre
    notes = [f"{name}: not probed, known for fewer than {MIN_SUBJECTS} fit subjects" for name in _others(names, usable)]
    return LinearProbe(scaler.mean_, scaler.scale_, weights, bias, tuple(notes), reach=math.sqrt(len(features)))


def auc_per_label(scores: Floats, targets: Floats, counts: Floats) -> Floats:
    """AUC [R, L]: of each label, over the test subjects for whom it is known; NaN where it cannot be told.

    Args:
        scores: [N, L].
        targets: [N, L] of 0, 1 or NaN.
        counts: [R, N], see `draw_counts`.
    """
    return _per_label(auc, scores, targets == 1.0, counts, np.isfinite(targets))


def r2_per_label(scores: Floats, targets: Floats, counts: Floats) -> Floats:
    """R2 [R, L]; arguments as in `auc_per_label`, targets any number."""
    return _per_label(r2, scores, targets, counts, np.isfinite(targets))


def one_class_notes(targets: Floats, names: Sequence[str]) -> list[str]:
    """One line for each label whose test subjects are all of one class: its AUC is NaN and left out of means."""
    flat = [name for column, name in enumerate(names) if not _has_both(targets[:, column])]
    return [f"{name}: left out of the means, test subjects are all of one class" for name in flat]


def _per_label(
    measure: Callable[..., Floats], scores: Floats, truth: NDArray[Any], counts: Floats, is_known: NDArray[np.bool_]
) -> Floats:
    """A measure [R, L] of each label, over the test subjects for whom score and truth are known."""
    columns = [
        measure(scores[known, label], truth[known, label], counts[:, known])
        for label, known in enumerate((np.isfinite(scores) & is_known).T)
    ]
    return np.stack(columns, axis=1) if columns else np.empty((len(counts), 0))


def _check(features: Features, targets: Floats, names: Sequence[str]) -> None:
    if targets.shape != (len(features), len(names)):
        raise ValueError(f"targets {targets.shape}: expected ({len(features)}, {len(names)})")
    if len(features) < MIN_SUBJECTS:
        raise DataError(f"probe: {len(features)} fit subjects, expected at least {MIN_SUBJECTS}")
    if not np.isfinite(features).all():
        raise DataError("probe: features hold NaN or inf, expected finite numbers")


def _choose_inverse_penalty(standard: Floats, targets: Floats) -> float:
    """The one with the best mean AUC on a held-out third; the strongest penalty wins ties."""
    shuffled = numpy_generator(0, "probe-penalty").permutation(len(standard))
    chosen, kept = shuffled[: len(shuffled) // 3], shuffled[len(shuffled) // 3 :]
    both = [label for label in range(targets.shape[1]) if _has_both(targets[kept, label])]
    best, choice = -np.inf, _INVERSE_PENALTIES[0]
    for candidate in _INVERSE_PENALTIES:
        weights, bias = _logistic(standard[kept], targets[kept], both, candidate)
        values = auc_per_label(standard[chosen] @ weights + bias, targets[chosen], np.ones((1, len(chosen))))
        mean = values[np.isfinite(values)].mean() if np.isfinite(values).any() else 0.0
        if mean > best:
            best, choice = float(mean), candidate
    return choice


def _logistic(
    standard: Floats, targets: Floats, labels: Sequence[int], inverse_penalty: float
) -> tuple[Floats, Floats]:
    weights, bias = _nothing(standard, targets)
    solver = "newton-cholesky" if standard.shape[1] <= _NEWTON_UP_TO else "lbfgs"
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # Newton handing over to L-BFGS close to the optimum
        for label in labels:
            known = np.isfinite(targets[:, label])
            model = LogisticRegression(C=inverse_penalty, solver=solver, max_iter=2000)
            model.fit(standard[known], targets[known, label] == 1.0)
            weights[:, label], bias[label] = model.coef_[0], model.intercept_[0]
    return weights, bias


def _nothing(standard: Floats, targets: Floats) -> tuple[Floats, Floats]:
    return np.zeros((standard.shape[1], targets.shape[1])), np.full(targets.shape[1], np.nan)


def _has_both(target: Floats) -> bool:
    return bool((target == 1.0).any() and (target == 0.0).any())


def _others(names: Sequence[str], usable: Sequence[int]) -> list[str]:
    return [name for column, name in enumerate(names) if column not in usable]
