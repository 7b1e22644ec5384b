"""Methods of `panfm probe`: what predicts a label of some subjects from frozen features of others.

    linear      logistic or ridge regression (linear_probe.py)
    knn         mean of the labels of the most similar subjects
    attentive   attention over a model's tokens, then a linear layer (attentive_probe.py)

Shape legend: N subjects to fit on, M subjects to predict, D features.
"""

from collections.abc import Callable, Mapping

import numpy as np

from panfm.evaluate.attentive_probe import attentive
from panfm.evaluate.label_prediction import Prediction, cannot_fit
from panfm.evaluate.linear_probe import fit_classifiers, fit_regressors
from panfm.evaluate.neighbours import neighbours_mean
from panfm.evaluate.scores import Floats

_SUREST = 1e-6
"""Probabilities of neighbours are kept this far from 0 and 1, so that their log-odds are finite."""


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


METHODS: Mapping[str, Method] = {"linear": linear, "knn": knn, "attentive": attentive}
