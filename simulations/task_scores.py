"""Scores what the models of a run with `[task]` predict of patients on whom they were not trained.

    holdout     the held-out patients in the split `test`: the federated model and each site's own
    site:NAME   patients of a site in the splits `val` and `test`, by the federated model

Private experts are copies of the director in the federated model.

Shape legend: N patients, K outputs of the task.
"""

from collections.abc import Iterator, Mapping
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
from panfm.evaluate.result import Score
from panfm.evaluate.scores import draw_counts
from panfm.finetune.task_result import label_scores
from panfm.models import PanModel
from panfm.models.pan import TASK_HEAD

HOLDOUT = "holdout"
_BATCH = 256


def score_task(run: RunConfig, models: Mapping[str, PanModel], cohort: Path) -> tuple[Score, ...]:
    """Score the trained models of a run on held-out patients, and the federated one on the sites' other patients.

    Args:
        models: Arm -> model; only `federated` and `site:<name>` have learned the task.
    Raises:
        DataError: the hold-out has no such label, or cells that are none of the task's.
    """
    trained = {arm: model for arm, model in models.items() if arm == "federated" or arm.startswith("site:")}
    scores = [score for arm, model in trained.items() for score in score_place(run, arm, model, cohort / HOLDOUT)]
    for folder in site_folders(cohort / "sites"):
        place = f"site:{load_site(folder).name}"
        scores += score_place(run, "federated", models["federated"], folder, ("val", "test"), group=place)
    return tuple(scores)


def score_place(
    run: RunConfig,
    arm: str,
    model: PanModel,
    folder: Path,
    splits: tuple[str, ...] = ("test",),
    group: str = HOLDOUT,
) -> Iterator[Score]:
    """Yield a model's scores on the labelled patients of a folder in some splits; none if there are no such patients.

    Raises:
        DataError: the label table does not go with the task.
    """
    assert run.task is not None
    store = open_store(folder, run.streams)
    try:
        labels = read_task_labels(folder, load_site(folder), run.task)
    except LimitError as error:
        raise DataError(f"{folder}: {error}") from error
    if labels.fault:
        raise DataError(labels.fault)
    truth = labels.of(store.subjects, len(run.task.outputs)).astype(np.float64)
    among = np.isin(np.asarray(store.splits, dtype=object), splits)
    at = np.flatnonzero(among & np.isfinite(truth).all(axis=1))
    if not len(at):
        return
    counts = draw_counts(len(at), run.probe.bootstrap, run.seed)
    predicted, known = (in_own_unit(run.task, values) for values in (predict(run.task, model, store, at), truth[at]))
    for score in label_scores(arm, run.task.kind, predicted, known, counts):
        yield Score(arm, group, score.metric, score.value, score.low, score.high, score.num_labels)


@torch.inference_mode()
def predict(task: TaskConfig, model: PanModel, store: ImageStore, at: NDArray[np.int64]) -> NDArray[np.float64]:
    """Predict probabilities, or numbers in scales from the centre, [N, K] for some patients of a store."""
    model.eval()
    head, chunks = model.heads.get_submodule(TASK_HEAD), [np.empty((0, len(task.outputs)))]
    for start in range(0, len(at), _BATCH):
        outputs = head(model.embed(store.batch(at[start : start + _BATCH], model.stream_names))).double()
        if task.kind == "classes":
            outputs = outputs.softmax(dim=1)
        elif task.kind == "yes-no":
            outputs = outputs.sigmoid()
        chunks.append(outputs.cpu().numpy())
    return np.concatenate(chunks)


def in_own_unit(task: TaskConfig, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bring numbers from scales from the centre to their own unit; probabilities stay as they are."""
    return values * (task.scale or 1.0) + (task.centre or 0.0) if task.kind == "number" else values
