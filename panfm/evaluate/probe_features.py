"""`panfm probe`: feature files and label tables in, one score per label out. A subject's sessions count as one."""

from collections.abc import Mapping, Sequence

import numpy as np

from panfm.data.joins import Join
from panfm.data.labels import Labels
from panfm.data.subjects import subject_key
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

    Subjects are matched by `subject_key`. Where a key stands in two tables, each place has a table of its own: the
    first label table belongs to the first feature file, and so on.

    A label of nothing but 0 and 1 is classified and scored by AUC; any other is regressed and scored by R2.

    Returns:
        One score per label, in the order of the tables, and notes: subjects of either side that the other lacks or
        spells differently, and labels that could not be told.
    Raises:
        DataError: files of different models or poolings, a subject twice, or too few labelled subjects in a split.
    """
    if len({table.model_hash for table in features}) > 1:
        raise DataError("features of different models, expected one model")
    if len(poolings := {table.pooling for table in features}) > 1:
        raise DataError(f"features of different poolings ({', '.join(sorted(poolings))}), expected one")
    features = [mean_of_sessions(table) for table in features]
    names = list(dict.fromkeys(name for table in labels for name in table.names))
    pairs, notes = _pairs(features, labels)
    known = [_by_subject(tables, names) for _, tables in pairs]
    fit, fit_targets = _rows(pairs, known, fit_split)
    test, test_targets = _rows(pairs, known, test_split)
    counts = draw_counts(len(test), bootstrap, 0)
    scores: list[Score] = []
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


Pairs = Sequence[tuple[Sequence[Features], Sequence[Labels]]]
"""Feature files, and the label tables of their subjects; one pair where every subject has a key of its own."""


def _pairs(features: Sequence[Features], labels: Sequence[Labels]) -> tuple[Pairs, list[str]]:
    """Which label tables belong to which feature files, and the account of the join."""
    files: list[Features | Labels] = [*features, *labels]
    for table in files:
        if twice := _repeated([table]):
            kind = "features" if isinstance(table, Features) else "labels"
            raise DataError(f"{kind}: found that subject {twice!r} stands twice in one file, expected one row each")
    pairs: Pairs = [(features, labels)]
    in_features, in_labels = _repeated(features), _repeated(labels)
    if in_features and in_labels and len(features) == len(labels):
        pairs = [([table], [own]) for table, own in zip(features, labels, strict=True)]
    elif in_features or in_labels:
        where, tables = ("labels", "tables") if in_labels else ("features", "feature files")
        remedy = "or a label table for every feature file, in the same order"
        given = f"subject {in_labels or in_features!r} stands in two {tables}"
        raise DataError(f"{where}: found that {given}, expected one, {remedy}")
    notes: list[str] = []
    for number, (places, own) in enumerate(pairs, start=1):
        join = Join.of(*([subject for table in side for subject in table.subjects] for side in (places, own)))
        if join.left or join.right or join.respelled or len(pairs) > 1:
            notes += join.lines(*(f"{name} {number}" if len(pairs) > 1 else name for name in ("features", "labels")))
    return pairs, notes


def _repeated(tables: Sequence[Features | Labels]) -> str | None:
    """A subject that stands twice, in one table or in two."""
    seen: set[str] = set()
    for table in tables:
        for subject in table.subjects:
            if (key := subject_key(subject)) in seen:
                return subject
            seen.add(key)
    return None


def _by_subject(labels: Sequence[Labels], names: Sequence[str]) -> dict[str, Floats]:
    known: dict[str, Floats] = {}
    for table in labels:
        columns = [names.index(name) for name in table.names]
        for subject, values in zip(table.subjects, table.values, strict=True):
            row = known[subject_key(subject)] = np.full(len(names), np.nan)
            row[columns] = values
    return known


def _rows(pairs: Pairs, known: Sequence[Mapping[str, Floats]], split: str) -> tuple[Floats, Floats]:
    """Features [N, D] and labels [N, L] of the labelled subjects of a split."""
    rows = [
        (row, own[subject_key(subject)])
        for (tables, _), own in zip(pairs, known, strict=True)
        for table in tables
        for subject, where, row in zip(table.subjects, table.splits, table.features, strict=True)
        if where == split and subject_key(subject) in own
    ]
    if len(rows) < MIN_SUBJECTS:
        raise DataError(f"split {split}: found {len(rows)} labelled subjects, expected at least {MIN_SUBJECTS}")
    return np.array([row for row, _ in rows], dtype=np.float64), np.array([values for _, values in rows])
