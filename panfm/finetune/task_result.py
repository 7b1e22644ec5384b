"""Scores a fine-tuned model, and probes of the frozen model, on the test patients, with 95 % intervals by patient.

    fine-tuned      the fine-tuned model
    linear-probe    a linear probe on the frozen embeddings of the model that fine-tuning started from
    knn             the weighted mean of the labels of the 10 most similar training patients, on the same embeddings
    grid            for a segmentation: the true masks, resampled to the stream's grid and back. A model may score
                    higher, as probabilities can place a border between voxels

All learn from the same patients: the probes are fitted on those that fine-tuning trains and validates on.

Shape legend: N test patients, K outputs, R resamples, E numbers of an embedding.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.data.masks import mask_from_grid
from panfm.data.readers import Volume, voxel_sizes
from panfm.data.store import ImageStore
from panfm.errors import DataError
from panfm.evaluate.embed import embed_store
from panfm.evaluate.neighbours import neighbours_mean
from panfm.evaluate.result import Score
from panfm.evaluate.scores import Floats, auc, draw_counts, interval, r2
from panfm.extras import needs_extra
from panfm.finetune.fine_tuning import FinetuneProgress
from panfm.finetune.finetuned_model import SegmentedImage, TaskModel, mask_image
from panfm.finetune.segmentation_scores import dice, hausdorff_95
from panfm.finetune.survival import concordance, fit_cox
from panfm.finetune.task_data import TaskData
from panfm.finetune.task_heads import predict_rows
from panfm.finetune.windows import predict_map
from panfm.models import PanModel
from panfm.outputs import write_json

RESULT_FILE = "result.json"
TUNED, LINEAR, KNN, GRID = "fine-tuned", "linear-probe", "knn", "grid"
_RESAMPLES = 1000

WriteMask = Callable[[int, SegmentedImage], None]
"""Called with the row of a test example in the store, and its predicted mask."""


@dataclass(frozen=True)
class TaskResult:
    """Scores of a fine-tuning on its test patients, number of patients, and notes."""

    scores: tuple[Score, ...]
    patients: Mapping[str, int]
    streams: Mapping[str, float]
    """Stream -> score of the fine-tuned model on test patients of whom it sees only this stream; empty for a
    segmentation or a single stream."""
    notes: tuple[str, ...]

    def write(self, path: Path, progress: FinetuneProgress) -> None:
        """Write `result.json`."""
        write_json(path, asdict(self) | {"training": asdict(progress)}, indent=1)

    def find(self, arm: str, metric: str, group: str = "all") -> Score:
        """Find one score. Raises KeyError: there is none."""
        for score in self.scores:
            if (score.arm, score.metric, score.group) == (arm, metric, group):
                return score
        raise KeyError((arm, metric, group))


@dataclass(frozen=True)
class FrozenFeatures:
    """Embeddings of patients by the model that fine-tuning starts from, and their labels."""

    fit: Floats
    """[patients, E] of the patients who train or validate."""
    fit_targets: Floats
    test: Floats
    """[N, E] of the test patients."""

    @classmethod
    def of(cls, model: PanModel, data: TaskData) -> "FrozenFeatures":
        """Embed the patients of a task of labels."""
        fit = np.sort(np.concatenate([data.train, data.validation]))
        embedded = (by_patient(embed_store(model, data.store, rows), data.patients(rows)) for rows in (fit, data.test))
        features, test = embedded
        return cls(features, by_patient(data.targets[fit], data.patients(fit)), test)


def by_patient(values: NDArray[Any], patients: Sequence[str]) -> Floats:
    """Mean over the examples of each patient, patients in order of first appearance; NaN values are left out."""
    rows_of: dict[str, list[int]] = {}
    for row, patient in enumerate(patients):
        rows_of.setdefault(patient, []).append(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN
        return np.stack([np.nanmean(values[rows], axis=0, dtype=np.float64) for rows in rows_of.values()])


def score_labels(task_model: TaskModel, model: PanModel, data: TaskData, frozen: FrozenFeatures) -> TaskResult:
    """Score a fine-tuned model of labels, the linear probe and nearest neighbours on the test patients."""
    patients = data.patients(data.test)
    truth = by_patient(data.targets[data.test], patients)
    counts = draw_counts(len(truth), _RESAMPLES, 0)

    def scores_of(arm: str, predicted: Floats) -> Iterator[Score]:
        return label_scores(arm, data.task.kind, predicted, truth, counts)

    predicted = np.concatenate(list(predict_rows(task_model.head, model, data.store, data.test)))
    neighbours = neighbours_mean(frozen.fit, frozen.fit_targets, frozen.test)
    if data.task.kind == "survival":
        neighbours = _event_rates(neighbours)
    scores = [*scores_of(TUNED, by_patient(predicted, patients)), *scores_of(KNN, neighbours)]
    notes = [*data.notes]
    try:
        probed, told = _linear_probe(frozen, data)
        scores += scores_of(LINEAR, probed)
        notes += [f"{LINEAR}: {note}" for note in told]
    except DataError as error:
        notes.append(f"{LINEAR}: left out ({error})")
    notes += [f"{one.metric}: not defined for these test patients" for one in scores[:1] if np.isnan(one.value)]
    return TaskResult(tuple(scores), data.num_patients(), _streams_alone(task_model, model, data), tuple(notes))


def label_scores(arm: str, kind: str, predicted: Floats, truth: Floats, counts: Floats) -> Iterator[Score]:
    """Yield AUC and accuracy for yes/no and classes, R2 and mean absolute error for numbers, the concordance for
    survival, over patients.

    Args:
        predicted: Probabilities or numbers [N, K]. A class that the model cannot predict is NaN: it is left out of the
            AUC and is never the likeliest class.
        truth: [N, K], 0 or 1 for yes/no and classes; for survival event and time [N, 2].
        counts: [R, N], see `draw_counts`.
    """
    if kind == "survival":
        yield _score(arm, "c-index", concordance(predicted[:, 0], truth[:, 0] == 1.0, truth[:, 1], counts)[:, None])
        return
    outputs = range(truth.shape[1])
    if kind == "number":
        yield _score(arm, "r2", np.stack([r2(predicted[:, one], truth[:, one], counts) for one in outputs], axis=1))
        yield _score(arm, "mae", _mean(np.abs(predicted - truth), counts))
        return
    areas = []
    for one, known in enumerate(np.isfinite(predicted).T):
        areas.append(auc(predicted[known, one], truth[known, one] == 1.0, counts[:, known]))
    yield _score(arm, "auc", np.stack(areas, axis=1))
    if kind == "classes":
        correct = np.where(np.isnan(predicted), -np.inf, predicted).argmax(axis=1) == truth.argmax(axis=1)
    else:
        correct = (predicted[:, 0] > 0.5) == (truth[:, 0] == 1.0)
    yield _score(arm, "accuracy", _mean(correct[:, None].astype(np.float64), counts))


def _event_rates(event_and_time: Floats) -> Floats:
    """Turn mean events and times [N, 2] of neighbours into events per time [N, 1], as a constant hazard has them."""
    return event_and_time[:, :1] / np.maximum(event_and_time[:, 1:], 1e-12)


def _linear_probe(frozen: FrozenFeatures, data: TaskData) -> tuple[Floats, tuple[str, ...]]:
    """Predict with a linear probe: scores [N, K], probabilities for yes/no, log hazards for survival; and the notes of
    the fit."""
    if data.task.kind == "survival":
        return fit_cox(frozen.fit, *frozen.fit_targets.T).risks(frozen.test)[:, None], ()
    with needs_extra("evaluate"):
        from panfm.evaluate.linear_probe import fit_classifiers, fit_regressors
    is_number = data.task.kind == "number"
    fit = fit_regressors if is_number else fit_classifiers
    probe = fit(frozen.fit, frozen.fit_targets, data.task.outputs)
    scores = probe.score(frozen.test)
    return (scores if is_number else 1.0 / (1.0 + np.exp(-np.clip(scores, -30.0, 30.0)))), probe.notes


def _streams_alone(task_model: TaskModel, model: PanModel, data: TaskData) -> dict[str, float]:
    """Stream -> first score of the fine-tuned model over the test patients with this stream, given only this stream."""
    if len(data.store.images) < 2:
        return {}
    alone = {}
    for name, rows in data.store.rows.items():
        store = ImageStore(data.store.subjects, data.store.splits, {name: data.store.images[name]}, {name: rows})
        if len(test := store.holders(data.test, [name])):
            patients = data.patients(test)
            predicted = np.concatenate(list(predict_rows(task_model.head, model, store, test)))
            truth = by_patient(data.targets[test], patients)
            counts = np.ones((1, len(truth)))
            mean = by_patient(predicted, patients)
            alone[name] = next(label_scores(TUNED, data.task.kind, mean, truth, counts)).value
    return alone


def score_segmentation(
    task_model: TaskModel, model: PanModel, data: TaskData, write_mask: WriteMask = lambda *_: None
) -> TaskResult:
    """Score a segmentation on the grids of the test images themselves."""
    task = data.task
    assert task.stream is not None
    config, measured = model.stream_configs[task.stream], []
    for index in data.test.tolist():
        image, mask = data.masked[index].read(config)
        probabilities, grid = predict_map(task_model.head, model, data.store, index, image, task.stream)
        spacing = voxel_sizes(image.affine).tolist() if isinstance(image, Volume) else [1.0, 1.0]
        classes = mask_from_grid(probabilities, image, grid)
        write_mask(index, mask_image(classes, image, task))
        true = data.large[index].mask if index in data.large else data.targets[index]
        one_hot = np.eye(len(task.values), dtype=np.float32)[true]
        at_best = mask_from_grid(np.ascontiguousarray(np.moveaxis(one_hot, -1, 0)), image, grid)
        measured.append(
            [
                _compare(classes == number, mask == value, at_best == number, spacing)
                for number, value in enumerate(task.values)
                if number
            ]
        )
    values = by_patient(np.array(measured), data.patients(data.test))
    counts = draw_counts(len(values), _RESAMPLES, 0)
    scores = []
    for column, (arm, metric) in enumerate(((TUNED, "dice"), (TUNED, "hd95"), (GRID, "dice"))):
        means = _mean(values[:, :, column], counts)
        scores.append(_score(arm, metric, means))
        pairs = zip(task.outputs[1:], means.T, strict=True)
        scores += [replace(_score(arm, metric, mean[:, None]), group=name) for name, mean in pairs]
    notes = [*data.notes, *([] if isinstance(image, Volume) else ["hd95 is in pixels"])]
    return TaskResult(tuple(scores), data.num_patients(), {}, (*notes, *_hd95_notes(np.array(measured))))


def _hd95_notes(measured: Floats) -> Iterator[str]:
    """Yield one note on the classes of images that have no HD95, if there are any.

    Args:
        measured: [N, classes, 4], the four numbers of `_compare`.
    """
    in_one, is_there = measured[..., 0] == 0.0, measured[..., 3] == 1.0
    without = np.isnan(measured[..., 1])
    missed, added = int((without & in_one & is_there).sum()), int((without & in_one & ~is_there).sum())
    if left_out := int(without.sum()):
        told = f"{missed} missed, {added} predicted but not there, {left_out - missed - added} in neither"
        yield f"hd95: leaves out {left_out} of {without.size} classes of images: {told}"


def _compare(
    predicted: NDArray[np.bool_], true: NDArray[np.bool_], at_best: NDArray[np.bool_], spacing: Sequence[float]
) -> tuple[float, float, float, float]:
    """Return Dice, HD95, Dice of the arm `grid`, and 1 if the class is in the true mask, else 0."""
    distance = hausdorff_95(predicted, true, spacing)
    return dice(predicted, true), distance, dice(at_best, true), float(true.any())


def _mean(values: Floats, counts: Floats) -> Floats:
    """Mean over patients of the known values [N, K], for every resample: [R, K]; NaN if no value is known."""
    known = np.isfinite(values)
    total, weight = counts @ np.where(known, values, 0.0), counts @ known
    mean: Floats = np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)
    return mean


def _score(arm: str, metric: str, values: Floats) -> Score:
    return Score.of(arm, "all", metric, interval(values), int(np.isfinite(values[0]).sum()))
