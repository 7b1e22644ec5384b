"""Probe of the classes of real pictures within a modality, at few labels.

Ridge regressions of the classes' indicators on standardised features, penalty by leave-one-out, are fitted on 5, 20 and
100 per cent of the labelled training pictures, at least two of a class, and tested on the data's own test split.
Modalities of one class have no metric.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from panfm.anatomy import parse_stream
from panfm.data.store import ImageStore
from panfm.evaluate.label_sums import PENALTIES
from panfm.evaluate.probe_labels import LabelledStore
from panfm.evaluate.scores import auc
from panfm.seeds import numpy_generator
from simulations.cohorts.opened import OpenedCohort

Indices = NDArray[np.int64]
Read = Callable[[ImageStore, str, Indices], NDArray[np.floating]]
"""Features [n, D] of one stream of the subjects at some indices of a store."""

LABEL_DRAWS = {5: 10, 20: 5, 100: 1}
"""Per cent of the labels -> number of draws of them."""
_LEAST_OF_A_CLASS = 2


def probe_streams(
    read: Read, cohort: OpenedCohort, seed: int, streams: Sequence[str], family: str = "auc"
) -> dict[str, float]:
    """Probe features of some streams at every share of the labels.

    Returns:
        `<family>_<stream>_<percent>`: mean AUC of the classes, over the draws of the labels.
    """
    measured = {}
    for stream in streams:
        fit = read_classes(cohort, read, stream, _site_of(cohort, stream), "train")
        test = read_classes(cohort, read, stream, cohort.holdout, "test")
        for percent, draws in LABEL_DRAWS.items():
            chosen = (label_draw(fit[1], percent, seed, stream, draw) for draw in range(draws))
            values = [class_auc(fit[0][rows], fit[1][rows], *test) for rows in chosen]
            measured[f"{family}_{stream}_{percent}"] = float(np.mean(values))
    return measured


def leave_one_out_error(read: Read, cohort: OpenedCohort) -> float:
    """Leave-one-out error of ridge regressions on all labelled training pictures at sites, by no test picture: mean
    over a stream's pictures, summed over classes and streams, under each stream's best penalty."""
    streams = [stream for stream in probed_streams(cohort) if _sites_of(cohort, stream)]
    fits = (read_classes(cohort, read, stream, _site_of(cohort, stream), "train") for stream in streams)
    return sum(class_error(features, classes) for features, classes in fits)


def probed_streams(cohort: OpenedCohort) -> list[str]:
    """Streams whose pictures are of several classes."""
    return [stream for stream in cohort.holdout.store.images if len(class_names(cohort, stream)) > 1]


def class_names(cohort: OpenedCohort, stream: str) -> list[str]:
    """Labels that are the classes of a stream's modality."""
    return [name for name in cohort.labels if name.startswith(f"{parse_stream(stream)[1]}-")]


def _sites_of(cohort: OpenedCohort, stream: str) -> list[LabelledStore]:
    return [site for site in cohort.sites.values() if stream in site.store.images]


def _site_of(cohort: OpenedCohort, stream: str) -> LabelledStore:
    """The one site that has a stream."""
    [site] = _sites_of(cohort, stream)
    return site


def read_classes(
    cohort: OpenedCohort, read: Read, stream: str, place: LabelledStore, split: str
) -> tuple[NDArray[np.floating], Indices]:
    """Features [n, D] and classes [n] of the pictures of a stream in one split of a place."""
    rows = np.intersect1d(place.store.rows[stream], place.store.indices(split))
    return read(place.store, stream, rows), place.values(class_names(cohort, stream), rows).argmax(axis=1)


def label_draw(classes: Indices, percent: int, seed: int, stream: str, draw: int) -> Indices:
    """Rows of a share of each class, at least two of it, or all that there are."""
    generator, rows = numpy_generator(seed, "labels", stream, percent, draw), []
    for one in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == one))
        rows.append(members[: max(_LEAST_OF_A_CLASS, round(percent / 100 * len(members)))])
    return np.sort(np.concatenate(rows))


def class_auc(
    features: NDArray[np.floating], classes: Indices, test_features: NDArray[np.floating], test_classes: Indices
) -> float:
    """Mean AUC over the classes, each against the others, of ridge regressions of their indicators."""
    scaler, known = StandardScaler().fit(features.astype(np.float64)), np.unique(classes)
    with threadpool_limits(limits=1):
        ridge = RidgeCV(alphas=PENALTIES).fit(scaler.transform(features), (classes[:, None] == known).astype(float))
        scores = ridge.predict(scaler.transform(test_features))
    once = np.ones((1, len(test_classes)))
    return float(np.mean([auc(scores[:, at], test_classes == one, once)[0] for at, one in enumerate(known)]))


def class_error(features: NDArray[np.floating], classes: Indices) -> float:
    """Squared leave-one-out error of the ridge regressions of `class_auc` under the best penalty: mean over pictures,
    summed over classes."""
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    targets = (classes[:, None] == np.unique(classes)).astype(float)
    with threadpool_limits(limits=1):
        ridge = RidgeCV(alphas=PENALTIES, store_cv_results=True).fit(scaled, targets)
    return float(ridge.cv_results_.mean(axis=0).sum(axis=0).min())
