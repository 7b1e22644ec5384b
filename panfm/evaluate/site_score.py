"""Scores features, or a head's predictions, on the labels of one site: AUC or R2, with its interval by patient.

    yes/no, classes    AUC, of classes the mean over each against the others
    number             R2, at least -1

Features are read by a ridge regression of the site's own (label_sums.py), its penalty chosen by leave-one-out errors
within the patients it is fitted on. It is scored on the site's held-out patients, or, where none are held out, by
five-fold cross-validation over patients. Needs numpy alone, and draws the same resamples whoever asks.

Shape legend: N patients, D features, K outputs of the label.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from panfm.evaluate.federated_probe import choose_penalty, ridge_path
from panfm.evaluate.label_sums import Floats, LabelSums, site_errors
from panfm.evaluate.scores import auc, draw_counts, interval, r2
from panfm.seeds import numpy_generator

_FOLDS = 5
_RESAMPLES = 1000
_DECIMALS = 2
"""Of all that is told: a finer number would tell more of a single patient."""


@dataclass(frozen=True)
class SiteScore:
    """AUC or R2 of a site's patients, with its 95 % interval over resamples of them, rounded to two decimals."""

    metric: str
    """auc or r2."""
    value: float
    low: float
    high: float
    patients: int
    """Who were scored."""
    is_held_out: bool
    """Whether they are held out from training; else they were scored by cross-validation."""


def enough_of(targets: Floats, floor: int) -> NDArray[np.bool_]:
    """Which outputs [K] at least `floor` patients have another value of than most; of a class, as many in and out."""
    most = [np.unique(column, return_counts=True)[1].max(initial=0) for column in targets.T]
    return len(targets) - np.array(most) >= max(floor, 1)


def probed(features: NDArray[np.floating], targets: Floats, train: NDArray[np.int64]) -> Floats:
    """Predictions [N, K] of all patients by a ridge regression on some of them.

    Args:
        features: [N, D]
        targets: [N, K]
        train: Indices of those that it is fitted on.
    """
    fitted = {"": targets[train]}
    path = ridge_path([LabelSums.of(features[train], targets[train])])
    errors = site_errors(features[train], fitted, {"": path}, floor=1)
    return choose_penalty(path, [{"errors": errors[""]}])[0].score(features)


def cross_validated(features: NDArray[np.floating], targets: Floats) -> Floats:
    """Predictions [N, K] of patients by ridge regressions on the other folds, which have like shares of the labels."""
    draw = numpy_generator(0, "evaluation-folds").random(len(targets))
    fold = np.empty(len(targets), dtype=np.int64)
    fold[np.lexsort((draw, *targets.T))] = np.arange(len(targets)) % _FOLDS
    predicted = np.empty(targets.shape)
    for number in range(min(_FOLDS, len(targets))):
        predicted[fold == number] = probed(features, targets, np.flatnonzero(fold != number))[fold == number]
    return predicted


def scored(predicted: Floats, targets: Floats, *, is_number: bool, is_held_out: bool) -> SiteScore:
    """Score predictions [N, K] of patients; NaN where resamples cannot tell."""
    counts, columns = draw_counts(len(targets), _RESAMPLES, 0), zip(predicted.T, targets.T, strict=True)
    values = [r2(p, t, counts).clip(min=-1.0) if is_number else auc(p, t == 1.0, counts) for p, t in columns]
    told = interval(np.stack(values, axis=1))
    value, low, high = (round(number, _DECIMALS) for number in (told.value, told.low, told.high))
    return SiteScore("r2" if is_number else "auc", value, low, high, len(targets), is_held_out)
