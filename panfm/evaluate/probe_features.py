"""`panfm probe`: feature files and label tables in, scores of every label out. A subject's sessions count as one.

Without a labelled subject in the test split, the subjects of the fit split are cross-validated, in five folds.

Shape legend: N subjects to fit on, M subjects to test, D features, L labels, R resamples.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from panfm.data.joins import Join
from panfm.data.labels import Labels
from panfm.data.subjects import subject_key
from panfm.errors import DataError
from panfm.evaluate.calibration import brier_score, calibration_error, weighted_kappa
from panfm.evaluate.embed import Features, mean_of_sessions
from panfm.evaluate.label_prediction import Prediction
from panfm.evaluate.linear_probe import MIN_SUBJECTS
from panfm.evaluate.probe_methods import Method, linear
from panfm.evaluate.result import Score
from panfm.evaluate.scores import Floats, auc, draw_counts, interval, r2
from panfm.seeds import numpy_generator

ARM, AGAINST, DIFFERENCE = "features", "against", "difference"
SHARES = (0.01, 0.05, 0.1, 0.5, 1.0)
"""Shares of the labelled subjects that a curve of few labels is fitted on."""
_DRAWS = 5
_FOLDS = 5
_LEAST_CROSSED = math.ceil(MIN_SUBJECTS * _FOLDS / (_FOLDS - 1))
"""Subjects of a cross-validation, so that every fold fits on `MIN_SUBJECTS`."""
_MOST_GRADES = 10
"""Whole numbers of so many values at most are read as grades, whose agreement is measured too."""


@dataclass(frozen=True)
class _Options:
    fit_split: str
    test_split: str
    method: Method
    few_labels: bool


@dataclass(frozen=True)
class _Examples:
    """Subjects to fit on and to test; in a cross-validation they are the same."""

    fit: Floats
    """[N, D], or tokens [N, T, 1 + D]."""
    fit_targets: Floats
    """[N, L]"""
    fit_subjects: tuple[str, ...]
    """Keys of the subjects to fit on."""
    test: Floats
    test_targets: Floats
    subjects: tuple[str, ...]
    """Keys of the test subjects."""
    is_crossed: bool


def probe_features(
    features: Sequence[Features],
    labels: Sequence[Labels],
    *,
    fit_split: str = "train",
    test_split: str = "test",
    bootstrap: int = 1000,
    method: Method = linear,
    few_labels: bool = False,
    against: Sequence[Features] = (),
) -> tuple[list[Score], list[str]]:
    """Fit on the subjects of one split, test on those of another.

    Subjects are matched by `subject_key`. Where a key stands in two tables, each place has a table of its own: the
    first label table belongs to the first feature file, and so on.

    A label of nothing but 0 and 1 is classified and scored by AUC, expected calibration error and Brier score; any
    other is regressed and scored by R2, and where it has few whole numbers, by the weighted kappa of grades.

    Args:
        bootstrap: Resamples of the test subjects.
        few_labels: Whether to fit on shares of the subjects too, in several draws each.
        against: Features of the same subjects by another model, to compare with.
    Returns:
        Scores in the order of the labels, with intervals over resamples of the subjects: of `features`, and, with
        `against`, of these and of the difference of AUC and R2, in the same resamples. And notes: subjects of either
        side that the other lacks or spells differently, and labels that could not be told.
    Raises:
        DataError: files of different models or poolings, a subject twice, too few labelled subjects in a split, or
            `against` has other subjects.
    """
    options = _Options(fit_split, test_split, method, few_labels)
    names = list(dict.fromkeys(name for table in labels for name in table.names))
    own, notes = _examples(features, labels, names, options)
    arms = {ARM: own}
    if against:
        arms[AGAINST], _ = _examples(against, labels, names, options)
        other = arms[AGAINST]
        if (other.fit_subjects, other.subjects) != (own.fit_subjects, own.subjects):
            raise DataError("--against: features of other subjects, expected the same subjects and splits")
    if own.is_crossed:
        notes.append(
            f"no labelled subject in the split {test_split}: {_FOLDS}-fold cross-validation over "
            f"{len(own.subjects)} subjects of the split {fit_split}"
        )
    counts = draw_counts(len(own.subjects), bootstrap, 0)
    scores: list[Score] = []
    aucs: dict[str, list[Floats]] = {}
    for column, name in enumerate(names):
        values = {arm: _measured(examples, column, name, counts, options, notes) for arm, examples in arms.items()}
        scores += _scores(name, values)
        if "auc" in values[ARM]:
            aucs.setdefault(name.partition("=")[0], []).append(values[ARM]["auc"])
    for name, of_classes in aucs.items():
        if len(of_classes) > 1:
            mean = interval(np.stack(of_classes, axis=1))
            scores.append(Score.of(ARM, f"{name} (mean of classes)", "auc", mean, len(of_classes)))
    return scores, notes


def _scores(name: str, values: Mapping[str, Mapping[str, Floats]]) -> Iterator[Score]:
    """Yield the scores of one label: of each arm, and of the difference of the first two."""
    for arm, by_metric in values.items():
        for metric, resamples in by_metric.items():
            yield Score.of(arm, name, metric, interval(resamples[:, None]), 1)
    if len(values) > 1:
        for metric in ("auc", "r2"):
            if metric in values[ARM]:
                apart = values[ARM][metric] - values[AGAINST][metric]
                yield Score.of(DIFFERENCE, name, metric, interval(apart[:, None]), 1)


def _measured(
    examples: _Examples, column: int, name: str, counts: Floats, options: _Options, notes: list[str]
) -> dict[str, Floats]:
    """Metric -> values [R] of one label; adds to the notes if it cannot be told."""
    here, there = examples.fit_targets[:, column], examples.test_targets[:, column]
    values = np.concatenate([here, there])
    values = values[np.isfinite(values)]
    is_number = not np.isin(values, (0.0, 1.0)).all()
    first = "r2" if is_number else "auc"
    whole = _predicted(examples, column, name, is_number, options)
    known = np.isfinite(whole.scores) & np.isfinite(there)
    scores, truth, weights = whole.scores[known], there[known], counts[:, known]
    measured = {first: _first_metric(scores, truth, weights, is_number)}
    if np.isnan(measured[first][0]):
        told = f"{name}: cannot be told, it does not vary among the {options.test_split} subjects"
        notes += [note for note in whole.notes or [told] if note not in notes]
    elif not is_number:
        probabilities = 1.0 / (1.0 + np.exp(-np.clip(scores, -30.0, 30.0)))
        measured["calibration error"] = calibration_error(probabilities, truth == 1.0, weights)
        measured["brier"] = brier_score(probabilities, truth == 1.0, weights)
    elif len(grades := np.unique(values)) <= _MOST_GRADES and (grades == np.rint(grades)).all():
        nearest = grades[np.abs(scores[:, None] - grades).argmin(axis=1)]
        measured["weighted kappa"] = weighted_kappa(nearest, truth, weights)
    for share in SHARES if options.few_labels else ():
        told = f"{share:.0%} of labels"
        measured[f"{first}, {told}"], left_out = _few_labels(examples, column, counts, share, is_number, options)
        notes += [f"{name}, {told}: {left_out} of {_DRAWS} draws are of one class, left out"] if left_out else []
    return measured


def _first_metric(scores: Floats, truth: Floats, counts: Floats, is_number: bool) -> Floats:
    return r2(scores, truth, counts) if is_number else auc(scores, truth == 1.0, counts)


def _few_labels(
    examples: _Examples, column: int, counts: Floats, share: float, is_number: bool, options: _Options
) -> tuple[Floats, int]:
    """Mean AUC or R2 [R] over several draws of a share of the labelled subjects, NaN if they are fewer than ten; and
    the number of draws that are left out, because all subjects are of one class, where others are not."""
    there, values = examples.test_targets[:, column], []
    for draw in range(_DRAWS if share < 1.0 else 1):
        predicted = _predicted(examples, column, "", is_number, options, share=share, draw=draw)
        told = np.isfinite(predicted.scores) & np.isfinite(there)
        values.append(_first_metric(predicted.scores[told], there[told], counts[:, told], is_number))
    known = [of_draw for of_draw in values if np.isfinite(of_draw[0])] or values
    mean: Floats = np.mean(known, axis=0)
    return mean, len(values) - len(known)


def _predicted(
    examples: _Examples,
    column: int,
    name: str,
    is_number: bool,
    options: _Options,
    *,
    share: float = 1.0,
    draw: int = 0,
) -> Prediction:
    """Predict a label of the test subjects; in a cross-validation, of each fold by the others."""
    targets = examples.fit_targets[:, column]
    if not examples.is_crossed:
        chosen = _drawn(targets, np.arange(len(targets)), share, draw)
        if chosen is None:
            return Prediction(np.full(len(examples.test), np.nan))
        return options.method(examples.fit[chosen], targets[chosen], examples.test, name, is_number)
    folds, scores, notes = _folds(targets), np.full(len(targets), np.nan), list[str]()
    for fold in range(_FOLDS):
        chosen = _drawn(targets, np.flatnonzero(folds != fold), share, draw)
        if chosen is None:
            return Prediction(np.full(len(targets), np.nan))
        own = options.method(examples.fit[chosen], targets[chosen], examples.fit[folds == fold], name, is_number)
        scores[folds == fold] = own.scores
        notes += own.notes
    return Prediction(scores, tuple(dict.fromkeys(notes)))


def _folds(targets: Floats) -> NDArray[np.int64]:
    """Fold of each subject, at random; every class, and high and low numbers, in all folds alike."""
    shuffled = numpy_generator(0, "probe-folds").permutation(len(targets))
    folds = np.empty(len(targets), dtype=np.int64)
    folds[shuffled[np.argsort(targets[shuffled], kind="stable")]] = np.arange(len(targets)) % _FOLDS
    return folds


def _drawn(targets: Floats, subjects: NDArray[np.int64], share: float, draw: int) -> NDArray[np.int64] | None:
    """Draw a share of the subjects with a label; all subjects for a share of 1, None if fewer than ten are drawn."""
    if share == 1.0:
        return subjects
    labelled = subjects[np.isfinite(targets[subjects])]
    count = round(share * len(labelled))
    if count < MIN_SUBJECTS:
        return None
    return np.sort(numpy_generator(0, "probe-few-labels", draw).permutation(labelled)[:count])


def _examples(
    features: Sequence[Features], labels: Sequence[Labels], names: Sequence[str], options: _Options
) -> tuple[_Examples, list[str]]:
    """Join features and labels; also return the account of the join."""
    if len({table.model_hash for table in features}) > 1:
        raise DataError("features of different models, expected one model")
    if len(poolings := {table.pooling for table in features}) > 1:
        raise DataError(f"features of different poolings ({', '.join(sorted(poolings))}), expected one")
    features = [mean_of_sessions(table) for table in features]
    pairs, notes = _pairs(features, labels)
    known = [_by_subject(tables, names) for _, tables in pairs]
    fit = _rows(pairs, known, options.fit_split)
    test = _rows(pairs, known, options.test_split)
    is_crossed = not test.subjects and len(fit.subjects) >= _LEAST_CROSSED
    test = fit if is_crossed else test
    for split, rows in ((options.fit_split, fit), (options.test_split, test)):
        if len(rows.subjects) < MIN_SUBJECTS:
            given = f"{len(rows.subjects)} labelled subjects"
            raise DataError(f"split {split}: found {given}, expected at least {MIN_SUBJECTS}")
    examples = _Examples(
        fit.features, fit.targets, fit.subjects, test.features, test.targets, test.subjects, is_crossed
    )
    return examples, notes


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


@dataclass(frozen=True)
class _Rows:
    """Labelled subjects of a split."""

    subjects: tuple[str, ...]
    features: Floats
    targets: Floats


def _rows(pairs: Pairs, known: Sequence[Mapping[str, Floats]], split: str) -> _Rows:
    """Features and labels of the labelled subjects of a split."""
    rows = [
        (subject_key(subject), row, own[subject_key(subject)])
        for (tables, _), own in zip(pairs, known, strict=True)
        for table in tables
        for subject, where, row in zip(table.subjects, table.splits, table.features, strict=True)
        if where == split and subject_key(subject) in own
    ]
    subjects, features, targets = zip(*rows, strict=True) if rows else ((), (), ())
    return _Rows(subjects, np.array(features, dtype=np.float64), np.array(targets, dtype=np.float64))
