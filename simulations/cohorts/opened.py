"""A cohort's folder, read back: images, labels, and probes of a model's frozen features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from panfm.config import RunConfig, site_folders
from panfm.data.store import ImageStore
from panfm.evaluate.input_sums import Constants, measured_constants
from panfm.evaluate.probe_cohort import Task, evaluate_cohort
from panfm.evaluate.probe_labels import LabelInfo, LabelledStore
from panfm.models import PanModel
from simulations.cohorts.cohort_labels import read_cohort_labels


@dataclass(frozen=True)
class OpenedCohort:
    """Sites and held-out patients, with their labels."""

    sites: Mapping[str, LabelledStore]
    """Name of a site's folder -> its patients."""
    holdout: LabelledStore
    labels: Mapping[str, LabelInfo]

    @classmethod
    def open(cls, folder: Path, run: RunConfig) -> Self:
        """Open a cohort's folder, and build the caches of its images where there are none."""
        labels = read_cohort_labels(folder)
        sites = {
            site.name: LabelledStore.open(site, run.streams, labels.kinds) for site in site_folders(folder / "sites")
        }
        return cls(sites, LabelledStore.open(folder / "holdout", run.streams, labels.kinds), labels.info)

    @property
    def stores(self) -> dict[str, ImageStore]:
        """Site -> its images."""
        return {name: site.store for name, site in self.sites.items()}

    @property
    def together(self) -> LabelledStore:
        """All sites' patients in one place."""
        sites = self.sites.values()
        labels = {name: np.concatenate([site.labels[name] for site in sites]) for name in self.labels}
        return LabelledStore(join_stores(list(self.stores.values())), labels)

    def task(self, run: RunConfig) -> Task:
        """The probing of a run's models: fitted on the sites, tested on held-out patients."""
        return Task(run, list(self.sites.values()), self.holdout, self.labels)

    def input_constants(self, run: RunConfig) -> dict[str, Constants]:
        """`input-centre` and `input-scale` of every stream at a site, from sums over the sites' training images."""
        return measured_constants(run, self.stores.values())

    def auc(self, run: RunConfig, model: PanModel) -> float:
        """AUC of a model's frozen features, over all labels and all held-out patients, as a run probes it."""
        return evaluate_cohort(self.task(run), {"model": model}, grid_arms=()).value("model")


def join_stores(stores: Sequence[ImageStore]) -> ImageStore:
    """Join several stores into one, e.g. for the centralised baseline of a study. Images are copied into memory."""
    offsets = np.cumsum([0, *(len(store.subjects) for store in stores)])
    streams = dict.fromkeys(stream for store in stores for stream in store.images)
    images: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for stream in streams:
        with_stream = [
            (store, offset) for store, offset in zip(stores, offsets, strict=False) if stream in store.images
        ]
        images[stream] = np.concatenate([store.images[stream] for store, _ in with_stream])
        rows[stream] = np.concatenate([store.rows[stream] + offset for store, offset in with_stream])
    subjects = tuple(subject for store in stores for subject in store.subjects)
    splits = tuple(split for store in stores for split in store.splits)
    labels = [store.labels for store in stores if store.labels is not None]
    return ImageStore(subjects, splits, images, rows, labels=np.concatenate(labels) if labels else None)
