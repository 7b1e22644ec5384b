"""Probe a cohort: every arm's frozen features fitted on the sites' training subjects, tested on the held-out ones.

Fit subjects have the organs that their site happened to scan; held-out subjects are complete. All arms see the same
subjects, labels and bootstrap resamples. An arm with fewer streams (a site's own model) is fitted on the subjects that
hold at least one of them; one with too few such subjects is left out with a note.

Where every held-out subject holds one stream, as in a cohort of modalities, no organ can be taken away: instead of the
missing-organ grid, each stream gets a probe of its own. Subjects of a stream that no site has are fitted on as well, if
the held-out folder has some to train on.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from panfm.anatomy import parse_stream
from panfm.config import RunConfig
from panfm.errors import DataError
from panfm.evaluate.embed import embed_store
from panfm.evaluate.fit_whitening import fit_whitening
from panfm.evaluate.linear_probe import (
    MIN_SUBJECTS,
    auc_per_label,
    fit_classifiers,
    fit_regressors,
    one_class_notes,
    r2_per_label,
)
from panfm.evaluate.probe_file import LinearProbe
from panfm.evaluate.probe_labels import LabelInfo, LabelledStore, label_groups
from panfm.evaluate.result import ProbeResult, Score
from panfm.evaluate.scores import Floats, draw_counts, interval
from panfm.evaluate.statistics import StatisticsReference, measure_store
from panfm.models import PanModel
from panfm.models.patch_features import has_block_features
from panfm.seeds import numpy_generator
from panfm.training.monitors import effective_rank

Features = NDArray[np.float32]


@dataclass(frozen=True)
class Arm:
    """One way to turn images into features."""

    fit: Callable[[], Features]
    """Features of the fit subjects [N, D]."""
    test: Callable[[Sequence[str]], Features]
    """Features of the held-out subjects [n, D] when only these streams are there."""
    usable: NDArray[np.bool_]
    """[N] fit subjects that this arm can read."""


@dataclass(frozen=True)
class Task:
    """Subjects and labels that all arms are probed on."""

    run: RunConfig
    places: Sequence[LabelledStore]
    """The sites; their training subjects are the fit subjects."""
    holdout: LabelledStore
    info: Mapping[str, LabelInfo]

    @cached_property
    def fit_places(self) -> list[LabelledStore]:
        """The sites, and the held-out folder if it has training subjects: of streams that no site has."""
        return [*self.places, *([self.holdout] if len(self.holdout.store.indices("train")) else [])]

    @cached_property
    def fit_indices(self) -> list[NDArray[np.int64]]:
        """Training subjects of each fit place."""
        return [place.store.indices("train") for place in self.fit_places]

    @cached_property
    def test_indices(self) -> NDArray[np.int64]:
        """The held-out test subjects."""
        return self.holdout.store.indices("test")

    @cached_property
    def labelled(self) -> NDArray[np.bool_]:
        """Which fit subjects have at least one label that is known, bool [N]."""
        known = np.isfinite(self.targets(list(self.info))[0])
        return np.asarray(known.any(axis=1), dtype=np.bool_)

    @cached_property
    def counts(self) -> Floats:
        """Bootstrap resamples of the held-out subjects, the same for all arms."""
        return draw_counts(len(self.test_indices), self.run.probe.bootstrap, self.run.seed)

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams of the held-out subjects."""
        return tuple(stream for stream in self.run.streams if stream in self.holdout.store.images)

    @property
    def is_one_stream_each(self) -> bool:
        """Whether every held-out subject holds one stream, and there are several streams."""
        rows = [self.holdout.store.rows[stream] for stream in self.streams]
        return len(rows) > 1 and sum(map(len, rows)) == len(np.unique(np.concatenate(rows)))

    def names(self, *, is_number: bool) -> list[str]:
        """Labels probed by regression, or those probed by classification."""
        return [name for name, info in self.info.items() if info.is_number == is_number]

    def targets(self, names: Sequence[str]) -> tuple[Floats, Floats]:
        """Label values of the fit and of the held-out subjects."""
        fit = [place.values(names, at) for place, at in zip(self.fit_places, self.fit_indices, strict=True)]
        return np.concatenate(fit), self.holdout.values(names, self.test_indices)


def evaluate_cohort(
    task: Task,
    models: Mapping[str, PanModel],
    *,
    grid_arms: Sequence[str] = ("federated",),
    on_arm: Callable[[str, int, int], None] = lambda *_: None,
) -> ProbeResult:
    """Probe each model and, beside them, the references.

    `statistics` reads plain statistics of the images; `tokenizer`, where the run's tokenizer computes statistics of
    blocks, exactly these; `training-mean`, where numbers are probed, nothing.

    Args:
        models: Arm -> trained model: federated, site:<name>, untrained.
        grid_arms: Arms whose missing-organ grid, or AUC per stream, is wanted.
        on_arm: Told the arm that begins, its number from 0, and how many there are.
    Raises:
        DataError: too few training subjects with labels, or nobody is held out.
    """
    if not task.places or not len(task.test_indices) or task.labelled.sum() < MIN_SUBJECTS:
        raise DataError(f"probe: expected held-out subjects and sites with {MIN_SUBJECTS} labelled training subjects")
    makers = {arm: partial(_model_arm, task, model) for arm, model in models.items()}
    makers["statistics"] = partial(_measured_arm, task)
    if has_block_features(task.run.model.tokenizer):
        makers["tokenizer"] = partial(_measured_arm, task, task.run.model.tokenizer)
    if any(info.is_number for info in task.info.values()):
        makers["training-mean"] = partial(_constant_arm, task)
    readings: dict[str, _Reading] = {}
    for number, (name, make) in enumerate(makers.items()):
        on_arm(name, number, len(makers))
        readings[name] = _read(task, name, make(), with_grid=name in grid_arms)
    return ProbeResult(
        scores=tuple(score for reading in readings.values() for score in reading.scores),
        missing={name: reading.grid for name, reading in readings.items() if reading.grid},
        streams={name: reading.streams for name, reading in readings.items() if reading.streams},
        few_labels={name: reading.few_labels for name, reading in readings.items() if reading.few_labels},
        balance={
            name: {"effective_rank": reading.effective_rank} for name, reading in readings.items() if reading.scores
        },
        subjects={"fit": sum(len(at) for at in task.fit_indices), "test": len(task.test_indices)},
        notes=tuple(f"{name}: {note}" for name, reading in readings.items() for note in reading.notes),
        labels=tuple(score for reading in readings.values() for score in reading.labels),
        known=_known(task),
        unmatched={
            place.name: {name: len(subjects) for name, subjects in asdict(place.unmatched).items()}
            for place in (*task.places, task.holdout)
        },
    )


def _known(task: Task) -> dict[str, dict[str, int]]:
    """Label -> fit and test subjects for whom it is known."""
    names = list(task.info)
    fit, test = (np.isfinite(values).sum(axis=0).tolist() for values in task.targets(names))
    return {name: {"fit": fit[column], "test": test[column]} for column, name in enumerate(names)}


@dataclass
class _Reading:
    """Scores and notes of one arm."""

    effective_rank: float
    scores: list[Score] = field(default_factory=list)
    labels: list[Score] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    grid: dict[str, float] = field(default_factory=dict)
    streams: dict[str, float] = field(default_factory=dict)
    few_labels: dict[str, float] = field(default_factory=dict)


def _read(task: Task, name: str, arm: Arm, *, with_grid: bool) -> _Reading:
    usable = arm.usable & task.labelled
    if usable.sum() < MIN_SUBJECTS:
        note = f"not probed, {usable.sum()} labelled training subjects hold its streams, expected {MIN_SUBJECTS}"
        return _Reading(float("nan"), notes=[note])
    everyone, test = arm.fit(), arm.test(task.streams)
    fit = everyone[usable]
    reading = _Reading(effective_rank(test))
    yes_no, numbers = task.names(is_number=False), task.names(is_number=True)
    if yes_no:
        truth_fit, truth_test = task.targets(yes_no)
        probe = fit_classifiers(fit, truth_fit[usable], yes_no)
        values = auc_per_label(probe.score(test), truth_test, task.counts)
        for group, members in label_groups(task.info).items():
            reading.scores.append(_score(name, group, "auc", values[:, [yes_no.index(label) for label in members]]))
        reading.labels += [_score(name, label, "auc", values[:, [column]]) for column, label in enumerate(yes_no)]
        reading.notes += [*probe.notes, *one_class_notes(truth_test, yes_no)]
        reading.few_labels = _few_labels(task, everyone, usable, test, yes_no)
        if with_grid and task.is_one_stream_each:
            reading.streams = _per_stream(task, arm, yes_no)
        elif with_grid:
            reading.grid = _grid(task, arm, probe, truth_test)
    if numbers:
        truth_fit, truth_test = task.targets(numbers)
        probe = fit_regressors(fit, truth_fit[usable], numbers)
        values = r2_per_label(probe.score(test), truth_test, task.counts)
        own = [_score(name, label, "r2", values[:, [column]]) for column, label in enumerate(numbers)]
        reading.scores += own
        reading.labels += own
        reading.notes += probe.notes
    return reading


def _few_labels(
    task: Task, fit: Features, usable: NDArray[np.bool_], test: Features, names: Sequence[str]
) -> dict[str, float]:
    """Mean AUC `auc_<n>` of probes fitted on n random labelled patients, the same ones for every arm; an arm is fitted
    on those of them that it can read, and NaN where they are too few."""
    truth_fit, truth_test = task.targets(names)
    once, labelled = np.ones((1, len(test))), np.flatnonzero(task.labelled)
    means = {}
    for number in task.run.probe.few_labels:
        values = []
        for draw in range(task.run.probe.few_draws):
            generator = numpy_generator(task.run.seed, "few-labels", number, draw)
            chosen = generator.choice(labelled, min(number, len(labelled)), replace=False)
            chosen = np.sort(chosen[usable[chosen]])
            if len(chosen) >= MIN_SUBJECTS:
                scores = fit_classifiers(fit[chosen], truth_fit[chosen], names).score(test)
                values.append(interval(auc_per_label(scores, truth_test, once)).value)
        means[f"auc_{number}"] = float(np.mean(values)) if values else float("nan")
    return means


def _score(arm: str, group: str, metric: str, values: Floats) -> Score:
    return Score.of(arm, group, metric, interval(values), int(np.isfinite(values[0]).sum()))


def _grid(task: Task, arm: Arm, probe: LinearProbe, truth: Floats) -> dict[str, float]:
    once = np.ones((1, len(truth)))
    return missing_grid(
        arm.test,
        lambda features: interval(auc_per_label(probe.score(features), truth, once)).value,
        task.streams,
        dominant=task.run.masking.static_organs,
        draws=task.run.probe.missing_draws,
        seed=task.run.seed,
    )


def _per_stream(task: Task, arm: Arm, names: Sequence[str]) -> dict[str, float]:
    """Mean AUC of a probe fitted and tested on the holders of one stream, by stream; NaN where it cannot be told."""
    fit, test = arm.fit(), arm.test(task.streams)
    truth_fit, truth_test = task.targets(names)
    values = {}
    for stream in task.streams:
        here = _holders(task, {stream}) & task.labelled & arm.usable
        there = np.isin(task.test_indices, task.holdout.store.rows[stream])
        values[stream] = float("nan")
        if here.sum() >= MIN_SUBJECTS:
            scores = fit_classifiers(fit[here], truth_fit[here], names).score(test[there])
            values[stream] = interval(auc_per_label(scores, truth_test[there], np.ones((1, there.sum())))).value
    return values


def _model_arm(task: Task, model: PanModel) -> Arm:
    """Features of a model, which gets a whitening if the run wants one: of its own, from all fit places' images."""
    known = set(model.stream_names)
    if task.run.features.whitening and model.whitening is None:
        stores = {str(number): place.store for number, place in enumerate(task.fit_places)}
        model.whitening = fit_whitening(model, stores, task.run.features, task.run.seed)

    def fit() -> Features:
        pairs = zip(task.fit_places, task.fit_indices, strict=True)
        return np.concatenate(
            [embed_store(model, place.store, at, known & set(place.store.images)) for place, at in pairs]
        )

    def test(streams: Sequence[str]) -> Features:
        return embed_store(model, task.holdout.store, task.test_indices, [name for name in streams if name in known])

    return Arm(fit, test, _holders(task, known))


def _measured_arm(task: Task, tokenizer: str | None = None) -> Arm:
    """Arm of a reference without a model: plain statistics of the images, or the patch features of a tokenizer."""
    measured = [measure_store(place.store, task.run.streams, tokenizer=tokenizer) for place in task.fit_places]
    reference = StatisticsReference.fit(zip(measured, task.fit_indices, strict=True))
    held_out = measure_store(task.holdout.store, task.run.streams, tokenizer=tokenizer)

    def fit() -> Features:
        pairs = zip(measured, task.fit_indices, strict=True)
        return np.concatenate([reference.features(statistics, at) for statistics, at in pairs])

    def test(streams: Sequence[str]) -> Features:
        return reference.features(held_out, task.test_indices, streams)

    return Arm(fit, test, _holders(task, set(reference.means)))


def _holders(task: Task, streams: set[str]) -> NDArray[np.bool_]:
    """Fit subjects that hold at least one of the streams [N]."""
    parts = []
    for place, at in zip(task.fit_places, task.fit_indices, strict=True):
        rows = [place.store.rows[stream] for stream in streams if stream in place.store.images]
        parts.append(np.isin(at, np.concatenate(rows) if rows else []))
    return np.concatenate(parts)


def _constant_arm(task: Task) -> Arm:
    """Knows nothing of the images: the probe can only answer the fit subjects' mean."""
    everyone = np.ones(sum(len(at) for at in task.fit_indices), dtype=bool)
    fit, test = np.zeros((len(everyone), 1), np.float32), np.zeros((len(task.test_indices), 1), np.float32)
    return Arm(lambda: fit, lambda _: test, everyone)


FeaturesOf = Callable[[tuple[str, ...]], NDArray[np.floating]]
"""Test features [n, dim] when only these streams are there."""


def missing_grid(
    features_of: FeaturesOf,
    mean_auc: Callable[[NDArray[np.floating]], float],
    streams: Sequence[str],
    *,
    dominant: Iterable[str] = (),
    draws: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """AUC with organs missing, by metric name.

    `auc` complete; `auc_missing_<k>` mean over sets of k organs removed (all sets for k = 1 and for one organ left,
    else at most `draws` seeded ones, the same for every model); `auc_drop_<organ>` what the removal of one organ costs
    (complete minus without it); `auc_only_<organ>` with it alone; `auc_no_dominant` without the dominant organs.

    Args:
        mean_auc: Mean AUC over labels of test features.
        streams: Streams of the complete test subjects.
    """
    organs = list(dict.fromkeys(parse_stream(stream)[0] for stream in streams))
    known: dict[frozenset[str], float] = {}

    def without(removed: Iterable[str]) -> float:
        gone = frozenset(removed) & frozenset(organs)
        if gone not in known:
            left = tuple(stream for stream in streams if parse_stream(stream)[0] not in gone)
            known[gone] = mean_auc(features_of(left))
        return known[gone]

    grid = {"auc": without(())}
    for count in range(1, len(organs)):
        chosen = removed_sets(organs, count, draws, seed)
        grid[f"auc_missing_{count}"] = float(np.mean([without(removed) for removed in chosen]))
    if len(organs) > 1:
        grid |= {f"auc_drop_{organ}": grid["auc"] - without([organ]) for organ in organs}
        grid |= {f"auc_only_{organ}": without(set(organs) - {organ}) for organ in organs}
    if set(dominant) & set(organs) and set(organs) - set(dominant):
        grid["auc_no_dominant"] = without(dominant)
    return grid


def removed_sets(organs: Sequence[str], count: int, draws: int, seed: int) -> list[tuple[str, ...]]:
    """Which sets of `count` organs are removed: all where single organs go or stay, else `draws` different ones."""
    every = list(itertools.combinations(sorted(organs), count))
    if count in (1, len(organs) - 1) or len(every) <= draws:
        return every
    chosen = numpy_generator(seed, "missing", count).choice(len(every), size=draws, replace=False)
    return [every[index] for index in sorted(chosen)]
