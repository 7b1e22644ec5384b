"""Linear probes of a subject's class, fitted and tested within one modality, over all modalities, and across them.

    own         fitted and tested on one modality
    pooled      fitted and tested on all
    across      leave one modality out: fitted on all the others, tested on the one

One multinomial logistic regression on frozen features, standardised on the fit subjects; its L2 penalty is the one with
the least log loss on a held-out third of them, the strongest of equals.

Shape legend: N subjects, D features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from panfm.errors import DataError
from panfm.evaluate.linear_probe import MIN_SUBJECTS, auc_per_label
from panfm.extras import needs_extra
from panfm.seeds import numpy_generator

with needs_extra("evaluate"):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

_INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Classed:
    """Features of subjects that each have one modality and one class."""

    features: NDArray[np.floating]
    """Features [N, D]."""
    modality: NDArray[np.str_]
    """Modality [N] of each subject."""
    classes: NDArray[np.int64]
    """Class [N] of each subject."""

    def only(self, chosen: NDArray[np.bool_]) -> "Classed":
        """Select some of the subjects by a mask [N]."""
        return Classed(self.features[chosen], self.modality[chosen], self.classes[chosen])


@dataclass(frozen=True)
class ClassScore:
    """Accuracy and AUC of a class probe."""

    accuracy: float
    """Share of the test subjects whose likeliest class is their own."""
    auc: float
    """Mean over the classes of the AUC of one class against the rest."""


def probe_classes(fit: Classed, test: Classed) -> ClassScore:
    """Fit a class probe on some subjects and test it on others.

    A class without fit subjects is never the answer, and one that either side lacks is left out of the mean AUC.

    Raises:
        DataError: fewer than MIN_SUBJECTS fit subjects, or they are all of one class.
    """
    if len(fit.classes) < MIN_SUBJECTS or len(np.unique(fit.classes)) < 2:
        num, kinds = len(fit.classes), len(np.unique(fit.classes))
        raise DataError(f"probe: {num} fit subjects of {kinds} classes, expected at least {MIN_SUBJECTS} of 2")
    with threadpool_limits(limits=1):
        model = _fit(fit, _choose_inverse_penalty(fit))
        shares = model.predict_proba(test.features)
    known = model.classes_
    values = auc_per_label(shares, np.equal.outer(test.classes, known).astype(np.float64), np.ones((1, len(shares))))
    told = np.isfinite(values)
    auc = float(values[told].mean()) if told.any() else float("nan")
    return ClassScore(float((known[shares.argmax(axis=1)] == test.classes).mean()), auc)


def probe_each_modality(fit: Classed, test: Classed, modalities: Sequence[str]) -> dict[str, ClassScore]:
    """Fit and test a class probe within each modality."""
    return {
        name: probe_classes(fit.only(fit.modality == name), test.only(test.modality == name)) for name in modalities
    }


def leave_one_modality_out(fit: Classed, test: Classed, modalities: Sequence[str]) -> dict[str, ClassScore]:
    """Fit a class probe on all modalities but one, and test it on that one, for each modality."""
    return {
        name: probe_classes(fit.only(fit.modality != name), test.only(test.modality == name)) for name in modalities
    }


def _choose_inverse_penalty(fit: Classed) -> float:
    shuffled = numpy_generator(0, "class-probe-penalty").permutation(len(fit.classes))
    chosen = np.isin(np.arange(len(shuffled)), shuffled[: len(shuffled) // 3])
    kept, chosen = ~chosen, chosen & np.isin(fit.classes, fit.classes[~chosen])
    if len(np.unique(fit.classes[kept])) < 2 or not chosen.any():
        return _INVERSE_PENALTIES[0]

    def loss(inverse_penalty: float) -> float:
        model = _fit(fit.only(kept), inverse_penalty)
        answers = model.predict_proba(fit.features[chosen])
        return float(log_loss(fit.classes[chosen], answers, labels=model.classes_))

    return min(_INVERSE_PENALTIES, key=loss)


def _fit(fit: Classed, inverse_penalty: float) -> Pipeline:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=2000))
    return model.fit(np.asarray(fit.features, dtype=np.float64), fit.classes)
