"""Compares, at every site of a pre-training run, the models that the site could keep, on its own patients.

    site:NAME       the model that the site reached alone
    federated       the run's model, private experts as copies of the director
    ensemble        the mean of both's predictions
    personalised    the run's model after `probe.personal-steps` more steps on the site's images, its experts kept
    start           what the run started from; `untrained` without a warm start

Each is read by a linear probe of the site's own labels (panfm/evaluate/site_score.py), scored on the site's patients in
the splits val and test or, where it has none, by cross-validation over its patients. Scores are the mean AUC over
yes/no labels, or R2 over numbers where there are no others. Differences to the site's own model are of the same
patients in every resample.

Shape legend: N patients, L labels, R resamples.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from panfm.data.store import Batch, ImageStore
from panfm.evaluate.linear_probe import auc_per_label, r2_per_label
from panfm.evaluate.probe_cohort import Task
from panfm.evaluate.probe_labels import LabelledStore
from panfm.evaluate.result import ENSEMBLE, GAIN, PERSONALISED, Score
from panfm.evaluate.scores import Floats, draw_counts, interval
from panfm.evaluate.site_score import cross_validated, enough_of, probed
from panfm.models import PanModel

MOST_FEATURES = 1024
"""Numbers of an embedding up to which the probes take seconds."""
_BATCH = 256
_FEWEST = 10
"""Patients that a probe is fitted on."""


def site_benefits(
    task: Task, models: Mapping[str, PanModel], personalised: Mapping[str, PanModel]
) -> tuple[Score, ...]:
    """Score the models of every site on its own patients, and how much better each is than the site's own.

    Args:
        task: Its places are the sites.
        models: Arm -> model: federated, site:<name>, untrained, and start in a warm start.
        personalised: Site -> its personalised model.
    Returns:
        Scores by site (`site:<name>`); none of sites with too few patients or labels.
    """
    reference = "start" if "start" in models else "untrained"
    scores: list[Score] = []
    for place in task.places:
        own = f"site:{place.name}"
        arms = {arm: models[arm] for arm in (own, "federated", reference) if arm in models}
        arms |= {PERSONALISED: personalised[place.name]} if place.name in personalised else {}
        if own in arms:
            scores += _site_scores(task, place, arms)
    return tuple(scores)


def _site_scores(task: Task, place: LabelledStore, arms: Mapping[str, PanModel]) -> Iterator[Score]:
    """Yield the scores of a site's models, of which the first is the site's own; none if nothing can be told."""
    own, store, group = next(iter(arms)), place.store, f"site:{place.name}"
    train, others = store.indices("train"), np.union1d(store.indices("val"), store.indices("test"))
    at = np.union1d(train, others)
    fitted, told = np.isin(at, train), np.isin(at, others if len(others) else train)
    is_number = not task.names(is_number=False)
    values = place.values(task.names(is_number=is_number), at)
    values = values[:, [_can_be_told(column, fitted, told) for column in values.T]]
    if not values.shape[1]:
        return
    metric, measure = ("r2", r2_per_label) if is_number else ("auc", auc_per_label)
    counts = draw_counts(int(told.sum()), task.run.probe.bootstrap, task.run.seed)
    features = embed_models(arms, store, at)
    predicted = {arm: _predict(of_arm, values, fitted) for arm, of_arm in features.items()}
    predicted[ENSEMBLE] = (predicted[own] + predicted["federated"]) / 2
    measured = {arm: measure(scores[told], values[told], counts) for arm, scores in predicted.items()}
    for arm, by_label in measured.items():
        yield Score.of(arm, group, metric, interval(by_label), values.shape[1])
        if arm != own:
            yield Score.of(f"{arm}{GAIN}", group, metric, interval(by_label - measured[own]), values.shape[1])


def _can_be_told(column: Floats, fitted: NDArray[np.bool_], told: NDArray[np.bool_]) -> bool:
    """Whether patients with different values of a label are there to fit a probe on, and to score it."""
    known = np.isfinite(column)
    fit, test = column[known & fitted], column[known & told]
    return len(fit) >= _FEWEST and bool(enough_of(fit[:, None], 1)[0] and enough_of(test[:, None], 1)[0])


@torch.inference_mode()
def embed_models(
    models: Mapping[str, PanModel], store: ImageStore, at: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """Arm -> features [N, D] of patients. Patch features, which take longest, are computed once for models that read
    the same of an image."""
    chunks: dict[str, list[NDArray[np.float32]]] = {arm: [] for arm in models}
    for start in range(0, len(at), _BATCH):
        read: list[tuple[object, Batch]] = []
        for arm, model in models.items():
            names = [name for name in model.stream_names if name in store.images]
            way = (model.tokenizer, [(name, model.stream_configs[name]) for name in names])
            patches = next((batch for known, batch in read if known == way), None)
            if patches is None:
                patches = model.patch_features(store.batch(at[start : start + _BATCH], names))
                read.append((way, patches))
            chunks[arm].append(model.eval().embed_patches(patches).float().numpy())
    return {arm: np.concatenate(parts) for arm, parts in chunks.items()}


def _predict(features: NDArray[np.float32], values: Floats, fitted: NDArray[np.bool_]) -> Floats:
    """Predictions [N, L] by probes fitted on some of the patients, or cross-validated where these are all; NaN where a
    label is not known. Labels that the same patients know share a penalty."""
    predicted = np.full(values.shape, np.nan)
    masks, of_label = np.unique(np.isfinite(values), axis=1, return_inverse=True)
    for number, known in enumerate(masks.T):
        cell = np.ix_(known, of_label.reshape(-1) == number)
        if fitted.all():
            predicted[cell] = cross_validated(features[known], values[cell])
        else:
            predicted[cell] = probed(features[known], values[cell], np.flatnonzero(fitted[known]))
    return predicted
