"""`panfm probe`: feature files and label tables in, one score per label out. A subject's sessions count as one."""

from collections.abc import Sequence

import numpy as np

from panfm.data.labels import Labels
from panfm.errors import DataError
from panfm.evaluate.embed import Features, mean_of_sessions
from panfm.evaluate.linear_probe import MIN_SUBJECTS, auc_per_label, fit_classifiers, fit_regressors, r2_per_label
from panfm.evaluate.result import Score
from panfm.evaluate.scores import Floats, draw_counts, interval

ARM = "features"


def probe_features(
    features: Sequence[Features],
    labels: Sequence[Labels],
    *,
    fit_split: str = "train",
    test_split: str = "test",
    bootstrap: int = 1000,
) -> tuple[list[Score], list[str]]:
    """Fit on the subjects of one split, test on those of another.

    A label of nothing but 0 and 1 is classified and scored by AUC; any other is regressed and scored by R2.

    Returns:
        One score per label, in the order of the tables, and a note for each that could not be told.
    Raises:
        DataError: files of different models or poolings, a subject twice, or too few labelled subjects in a split.
    """
    if len({table.model_hash for table in features}) > 1:
        raise DataError("features of different models, expected one model")
    if len(poolings := {table.pooling for table in features}) > 1:
        raise DataError(f"features of different poolings ({', '.join(sorted(poolings))}), expected one")
    features = [mean_of_sessions(table) for table in features]
    names = list(dict.fromkeys(name for table in labels for name in table.names))
    known = _by_subject(labels, names)
    fit, fit_targets = _rows(features, known, fit_split)
    test, test_targets = _rows(features, known, test_split)
    counts = draw_counts(len(test), bootstrap, 0)
    scores: list[Score] = []
    notes: list[str] = []
    for column, name in enumerate(names):
        here, there = fit_targets[:, [column]], test_targets[:, [column]]
        values = np.concatenate([here, there])
        is_number = not np.isin(values[np.isfinite(values)], (0.0, 1.0)).all()
        train, read = (fit_regressors, r2_per_label) if is_number else (fit_classifiers, auc_per_label)
        probe = train(fit, here, [name])
        estimate = interval(read(probe.score(test), there, counts))
        scores.append(Score.of(ARM, name, "r2" if is_number else "auc", estimate, 1))
        if np.isnan(estimate.value):
            notes += probe.notes or [f"{name}: cannot be told, it does not vary among the {test_split} subjects"]
    return scores, notes


def _by_subject(labels: Sequence[Labels], names: Sequence[str]) -> dict[str, Floats]:
    known: dict[str, Floats] = {}
    for table in labels:
        columns = [names.index(name) for name in table.names]
        for subject, values in zip(table.subjects, table.values, strict=True):
            if subject in known:
                raise DataError(f"labels: subject {subject!r} stands in two tables, expected one")
            known[subject] = np.full(len(names), np.nan)
            known[subject][columns] = values
    return known


def _rows(features: Sequence[Features], known: dict[str, Floats], split: str) -> tuple[Floats, Floats]:
    """Features [N, D] and labels [N, L] of the labelled subjects of a split."""
    rows = [
        (row, known[subject])
        for table in features
        for subject, where, row in zip(table.subjects, table.splits, table.features, strict=True)
        if where == split and subject in known
    ]
    if len(rows) < MIN_SUBJECTS:
        raise DataError(f"split {split}: found {len(rows)} labelled subjects, expected at least {MIN_SUBJECTS}")
    return np.array([row for row, _ in rows], dtype=np.float64), np.array([values for _, values in rows])
