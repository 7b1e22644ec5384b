"""Measures the AUC of an arm while organs are taken away from the held-out patients, by organ, label and category.

    auc                     mean over all labels; every held-out patient has all organs
    auc_missing_<n>         n organs taken away: all sets of one organ and of all but one, else some random sets
    auc_missing             mean of the above over n
    auc_without_<organ>     one organ taken away
    <kind>, <kind>_missing  of auc and auc_missing the mean over the labels of one kind: category or disease
    label_<name>, label_missing_<name>  of auc and auc_missing the part of one label

Shape legend: N patients, L labels, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from panfm.anatomy import parse_stream
from panfm.evaluate.linear_probe import auc_per_label, fit_classifiers
from panfm.evaluate.probe_cohort import removed_sets
from panfm.evaluate.probe_labels import LabelInfo
from panfm.evaluate.scores import Floats
from simulations.cohorts.opened import OpenedCohort

Streams = tuple[str, ...]
AucOf = Callable[[Streams], Floats]
"""Streams that the held-out patients have -> AUC of every label [L]."""


@dataclass(frozen=True)
class ProbeLabels:
    """Labels of the training patients of all sites together, on whom probes are fitted, and of the held-out ones."""

    names: Sequence[str]
    fit: Floats
    """[N, L]"""
    test: Floats
    """[n, L]"""

    @classmethod
    def of(cls, cohort: OpenedCohort) -> Self:
        """Read the labels of a cohort."""
        names = list(cohort.labels)
        sites = [site.values(names, site.store.indices("train")) for site in cohort.sites.values()]
        return cls(names, np.concatenate(sites), cohort.holdout.values(names, cohort.holdout.store.indices("test")))

    def auc(self, scores: Floats) -> Floats:
        """AUC [L] of the held-out patients' scores [n, L]."""
        return auc_per_label(scores, self.test, np.ones((1, len(self.test))))[0]

    def probed(
        self,
        fit: NDArray[np.floating],
        features_of: Callable[[Streams], NDArray[np.floating]],
        usable: NDArray[np.bool_] | None = None,
    ) -> AucOf:
        """Fit the probe on features as patients were scanned, and read held-out features by it.

        Args:
            fit: [N, D]
            features_of: Features [n, D] of the held-out patients when they have these streams.
            usable: Which training patients the probe is fitted on, bool [N]; all when left out.
        """
        chosen = np.ones(len(fit), dtype=bool) if usable is None else usable
        probe = fit_classifiers(fit[chosen], self.fit[chosen], self.names)
        return lambda streams: self.auc(probe.score(features_of(streams)))


@dataclass(frozen=True)
class PartialModel:
    """A model that reads some of the organs."""

    streams: Streams
    auc_of: AucOf


def mean_of(models: Sequence[PartialModel]) -> AucOf:
    """Average, label by label, the AUC of the models that read at least one of the organs that are there."""
    return lambda streams: np.mean(_readable(models, streams), axis=0, dtype=np.float64)


def best_of(models: Sequence[PartialModel]) -> AucOf:
    """Take the model with the best mean AUC, for each set of organs anew."""

    def auc_of(streams: Streams) -> Floats:
        aucs = _readable(models, streams)
        return aucs[int(np.argmax([np.nanmean(auc) for auc in aucs]))]

    return auc_of


def _readable(models: Sequence[PartialModel], streams: Streams) -> list[Floats]:
    return [model.auc_of(streams) for model in models if set(model.streams) & set(streams)]


def organ_metrics(
    auc_of: AucOf, streams: Sequence[str], info: Mapping[str, LabelInfo], *, draws: int, seed: int
) -> dict[str, float]:
    """All metrics of one arm.

    Args:
        streams: Those of the held-out patients.
        info: Label -> its kind, in the order of the labels.
        draws: Random sets for each number of organs; every arm has the same.
        seed: Of these sets.
    """
    organs = list(dict.fromkeys(parse_stream(stream)[0] for stream in streams))

    def without(removed: Sequence[str]) -> Floats:
        return auc_of(tuple(stream for stream in streams if parse_stream(stream)[0] not in removed))

    complete, missing, metrics = without(()), [], {}
    for count in range(1, len(organs)):
        by_set = {removed: without(removed) for removed in removed_sets(organs, count, draws, seed)}
        missing.append(np.mean(list(by_set.values()), axis=0))
        metrics[f"auc_missing_{count}"] = _mean(missing[-1])
        if count == 1:
            metrics |= {f"auc_without_{organ}": _mean(by_set[organ,]) for organ in organs}
    apart = np.mean(missing, axis=0) if missing else np.full(len(complete), np.nan)
    metrics |= {"auc": _mean(complete), "auc_missing": _mean(apart)}
    for kind in dict.fromkeys(label.kind for label in info.values()):
        of_kind = np.array([label.kind == kind for label in info.values()])
        metrics |= {kind: _mean(complete[of_kind]), f"{kind}_missing": _mean(apart[of_kind])}
    for column, name in enumerate(info):
        metrics |= {f"label_{name}": float(complete[column]), f"label_missing_{name}": float(apart[column])}
    return metrics


def _mean(aucs: Floats) -> float:
    """Mean over the labels whose AUC can be told."""
    known = aucs[np.isfinite(aucs)]
    return float(known.mean()) if len(known) else float("nan")
