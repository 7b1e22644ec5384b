"""Predictions of a label by a probe, and why a label cannot be fitted.

Shape legend: M subjects to predict.
"""

from dataclasses import dataclass

import numpy as np

from panfm.evaluate.linear_probe import MIN_SUBJECTS
from panfm.evaluate.scores import Floats


@dataclass(frozen=True)
class Prediction:
    """Predictions of one label."""

    scores: Floats
    """[M]: log-odds of a yes, or numbers; NaN if the label could not be fitted."""
    notes: tuple[str, ...] = ()


def cannot_fit(labels: Floats, name: str, is_number: bool) -> tuple[str, ...] | None:
    """Notes on why known labels cannot be fitted; None if they can."""
    if len(labels) < MIN_SUBJECTS:
        return (f"{name}: not probed, known for fewer than {MIN_SUBJECTS} fit subjects",)
    if not is_number and len(np.unique(labels)) < 2:
        return (f"{name}: not probed, fit subjects are all of one class",)
    return None
