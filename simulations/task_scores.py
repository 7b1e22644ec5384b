"""Scores what the models of a run with `[task]` predict of patients on whom they were not trained.

    holdout     the held-out patients in the split `test`: the federated model, and each site's own
    site:NAME   patients of a site in the splits `val` and `test`: the federated model, the site's own, the mean of both
                (`ensemble`), and, if the run asks for it, the federated model after `task.personal-steps` more steps
                on the site's labels; and how much better each is than the site's own, on the same resamples of patients

Private experts are copies of the director in the federated model.

Shape legend: N patients, K outputs of the task, R resamples.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from panfm.config import RunConfig, load_site, site_folders
from panfm.config.task import TaskConfig
from panfm.data.cache import open_store
from panfm.data.store import ImageStore
from panfm.data.task_labels import read_task_labels
from panfm.errors import DataError, LimitError
from panfm.evaluate.result import ENSEMBLE, GAIN, HOLDOUT, PERSONALISED, Score
from panfm.evaluate.scores import Floats, auc, draw_counts, interval, r2
from panfm.finetune.task_result import label_scores
from panfm.models import PanModel
from panfm.models.pan import TASK_HEAD

_BATCH = 256


@dataclass(frozen=True)
class TaskPlace:
    """Labelled patients of a folder in some of its splits."""

    run: RunConfig
    store: ImageStore
    at: NDArray[np.int64]
    """Indices of the N patients in the store."""
    truth: Floats
    """[N, K]: 0 and 1 for classes, numbers in their own unit."""
    group: str

    @classmethod
    def open(cls, run: RunConfig, folder: Path, splits: tuple[str, ...], group: str) -> "TaskPlace":
        """Read images and labels. Raises DataError: the label table does not go with the run's task."""
        assert run.task is not None
        store = open_store(folder, run.streams)
        try:
            labels = read_task_labels(folder, load_site(folder), run.task)
        except LimitError as error:
            raise DataError(f"{folder}: {error}") from error
        if labels.fault:
            raise DataError(labels.fault)
        truth = in_own_unit(run.task, labels.of(store.subjects, len(run.task.outputs)).astype(np.float64))
        among = np.isin(np.asarray(store.splits, dtype=object), splits)
        at = np.flatnonzero(among & np.isfinite(truth).all(axis=1))
        return cls(run, store, at, truth[at], group)

    @property
    def counts(self) -> Floats:
        """Resamples of the patients [R, N], the same for all models."""
        return draw_counts(len(self.at), self.run.probe.bootstrap, self.run.seed)

    def predict(self, model: PanModel) -> Floats:
        """Predict the patients' probabilities or numbers [N, K]."""
        assert self.run.task is not None
        return in_own_unit(self.run.task, predict(self.run.task, model, self.store, self.at))

    def scores(self, arm: str, predicted: Floats) -> Iterator[Score]:
        """Yield all scores of a model's predictions; none without patients."""
        assert self.run.task is not None
        if len(self.at):
            for score in label_scores(arm, self.run.task.kind, predicted, self.truth, self.counts):
                yield Score(arm, self.group, score.metric, score.value, score.low, score.high, score.num_labels)

    def gain(self, arm: str, predicted: Floats, baseline: Floats) -> Iterator[Score]:
        """Yield how much larger the AUC or R2 of some predictions is than that of others; none without patients."""
        assert self.run.task is not None
        if len(self.at):
            metric = "r2" if self.run.task.kind == "number" else "auc"
            ours, theirs = (self._headline(values) for values in (predicted, baseline))
            yield Score.of(f"{arm}{GAIN}", self.group, metric, interval(ours - theirs), self.truth.shape[1])

    def _headline(self, predicted: Floats) -> Floats:
        """AUC or R2 of each output under every resample, [R, K]."""
        assert self.run.task is not None
        is_number, counts = self.run.task.kind == "number", self.counts
        columns = zip(predicted.T, self.truth.T, strict=True)
        return np.stack([r2(p, t, counts) if is_number else auc(p, t == 1.0, counts) for p, t in columns], axis=1)


def score_task(
    run: RunConfig, models: Mapping[str, PanModel], personalised: Mapping[str, PanModel], cohort: Path
) -> tuple[Score, ...]:
    """Score the trained models of a run on the held-out patients, and on patients of each site.

    Args:
        models: Arm -> model; `federated` and `site:<name>` have learned the task.
        personalised: Site -> the federated model after more steps on its labels.
    Raises:
        DataError: a place has no such label, or cells that are none of the task's.
    """
    trained = {arm: model for arm, model in models.items() if arm == "federated" or arm.startswith("site:")}
    holdout = TaskPlace.open(run, cohort / HOLDOUT, ("test",), HOLDOUT)
    scores = [score for arm, model in trained.items() for score in holdout.scores(arm, holdout.predict(model))]
    for folder in site_folders(cohort / "sites"):
        name = load_site(folder).name
        place = TaskPlace.open(run, folder, ("val", "test"), f"site:{name}")
        own = {"federated": trained["federated"], f"site:{name}": trained.get(f"site:{name}")}
        own |= {PERSONALISED: personalised[name]} if name in personalised else {}
        predicted = {arm: place.predict(model) for arm, model in own.items() if model is not None}
        if f"site:{name}" in predicted:
            predicted[ENSEMBLE] = (predicted["federated"] + predicted[f"site:{name}"]) / 2
        scores += [score for arm, values in predicted.items() for score in place.scores(arm, values)]
        baseline = predicted.pop(f"site:{name}", None)
        if baseline is not None:
            scores += [score for arm, values in predicted.items() for score in place.gain(arm, values, baseline)]
    return tuple(scores)


@torch.inference_mode()
def predict(task: TaskConfig, model: PanModel, store: ImageStore, at: NDArray[np.int64]) -> Floats:
    """Predict probabilities, or numbers in scales from the centre, [N, K] for some patients of a store."""
    model.eval()
    streams = [name for name in model.stream_names if name in store.images]
    head, chunks = model.heads.get_submodule(TASK_HEAD), [np.empty((0, len(task.outputs)))]
    for start in range(0, len(at), _BATCH):
        outputs = head(model.embed(store.batch(at[start : start + _BATCH], streams))).double()
        if task.kind == "classes":
            outputs = outputs.softmax(dim=1)
        elif task.kind == "yes-no":
            outputs = outputs.sigmoid()
        chunks.append(outputs.cpu().numpy())
    return np.concatenate(chunks)


def in_own_unit(task: TaskConfig, values: Floats) -> Floats:
    """Bring numbers from scales from the centre to their own unit; probabilities stay as they are."""
    return values * (task.scale or 1.0) + (task.centre or 0.0) if task.kind == "number" else values
