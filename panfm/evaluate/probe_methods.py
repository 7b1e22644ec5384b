"""Methods of `panfm probe`: what predicts a label of some subjects from frozen features of others.

    linear      logistic or ridge regression (linear_probe.py)
    knn         mean of the labels of the most similar subjects
    attentive   attention over a model's tokens, then a linear layer (attentive_probe.py)

Shape legend: N subjects to fit on, M subjects to predict, D features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from panfm.errors import DataError
from panfm.evaluate.linear_probe import MIN_SUBJECTS, fit_classifiers, fit_regressors
from panfm.evaluate.neighbours import neighbours_mean
from panfm.evaluate.scores import Floats

_SUREST = 1e-6
"""Probabilities of neighbours are kept this far from 0 and 1, so that their log-odds are finite."""


@dataclass(frozen=True)
class Prediction:
    """Predictions of one label."""

    scores: Floats
    """[M]: log-odds of a yes, or numbers; NaN if the label could not be fitted."""
    notes: tuple[str, ...] = ()


Method = Callable[[Floats, Floats, Floats, str, bool], Prediction]
"""Takes features [N, D] and labels [N] to fit on, features [M, D] to predict, the label's name, and whether it is a
number. Labels may be NaN (unknown)."""


def linear(fit: Floats, labels: Floats, test: Floats, name: str, is_number: bool) -> Prediction:
    """Predict by a regression whose penalty is chosen on the subjects of the fit."""
    probe = (fit_regressors if is_number else fit_classifiers)(fit, labels[:, None], [name])
    return Prediction(probe.score(test)[:, 0], probe.notes)


def knn(fit: Floats, labels: Floats, test: Floats, name: str, is_number: bool) -> Prediction:
    """Predict by the mean label of the 10 most similar subjects."""
    known = np.isfinite(labels)
    if (notes := cannot_fit(labels[known], name, is_number)) is not None:
        return Prediction(np.full(len(test), np.nan), notes)
    means = neighbours_mean(fit[known], labels[known, None], test)[:, 0]
    if is_number:
        return Prediction(means)
    sure = np.clip(means, _SUREST, 1.0 - _SUREST)
    return Prediction(np.log(sure / (1.0 - sure)))


def cannot_fit(labels: Floats, name: str, is_number: bool) -> tuple[str, ...] | None:
    """Notes on why known labels cannot be fitted; None if they can.

    Raises:
        DataError: there are fewer than 10.
    """
    if len(labels) < MIN_SUBJECTS:
        raise DataError(f"probe: {len(labels)} fit subjects, expected at least {MIN_SUBJECTS}")
    if not is_number and len(np.unique(labels)) < 2:
        return (f"{name}: not probed, fit subjects are all of one class",)
    return None


def _attentive(fit: Floats, labels: Floats, test: Floats, name: str, is_number: bool) -> Prediction:
    from panfm.evaluate.attentive_probe import attentive

    return attentive(fit, labels, test, name, is_number)


METHODS: Mapping[str, Method] = {"linear": linear, "knn": knn, "attentive": _attentive}
