"""Trains the arms of the study `pan-fm`, and reads with each patients of whom some organs are missing.

A training gives one arm or more, each as a function from the organs that are there to the AUC of every label. All
models begin as the same untrained network: an initial parameter depends on the seed and on its own name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.evaluate.embed import embed_store
from panfm.evaluate.statistics import StatisticsReference, StreamStatistics, measure_store
from panfm.models import PanModel, build_model
from simulations.alone import train_alone, train_together
from simulations.cohorts.opened import OpenedCohort, join_stores
from simulations.studies._federations import federate
from simulations.studies._missing_organs import AucOf, PartialModel, ProbeLabels, Streams, best_of, mean_of
from simulations.studies._multi_label import LabelledImages, MultiLabelClassifier

Arms = dict[str, AucOf]
Features = NDArray[np.floating]
Embeddings = Mapping[str, StreamStatistics]
"""Stream -> embeddings of its holders by the model of this stream alone."""


@dataclass(frozen=True)
class Setting:
    """What all arms of one pair have in common."""

    run: RunConfig
    folder: Path
    """Of the cohort."""
    cohort: OpenedCohort

    @cached_property
    def train(self) -> ImageStore:
        """Training patients of all sites in one place, in the order of the labels."""
        stores = self.cohort.stores.values()
        return join_stores([some_subjects(store, store.indices("train")) for store in stores])

    @cached_property
    def test(self) -> ImageStore:
        """The held-out patients."""
        store = self.cohort.holdout.store
        return some_subjects(store, store.indices("test"))

    @cached_property
    def labels(self) -> ProbeLabels:
        """Labels of both."""
        return ProbeLabels.of(self.cohort)

    def probed(self, model: PanModel, streams: Streams) -> AucOf:
        """Probe the frozen features that a model reads off some streams."""
        usable = np.isin(everyone(self.train), self.train.holders(everyone(self.train), streams))
        fit = embed_store(model, self.train, everyone(self.train), streams)
        return self.labels.probed(
            fit, lambda there: embed_store(model, self.test, everyone(self.test), _common(streams, there)), usable
        )


def federated(setting: Setting) -> Arms:
    """All sites train one model together, on organs as they were scanned."""
    model = federate(setting.run, setting.folder).model
    return {"federated": setting.probed(model, model.stream_names)}


def random_masking(setting: Setting) -> Arms:
    """The federation with random masks, as a multi-organ model without saliency is trained."""
    masking = setting.run.masking.model_copy(update={"policy": "random"})
    model = federate(setting.run.model_copy(update={"masking": masking}), setting.folder).model
    return {"random-masking": setting.probed(model, model.stream_names)}


def centralised(setting: Setting) -> Arms:
    """One model is trained on the images of all sites in one place, as many steps as all sites take together."""
    model = train_together(setting.run, list(setting.cohort.stores.values()))
    return {"centralised": setting.probed(model, model.stream_names)}


def local(setting: Setting) -> Arms:
    """Every site trains a model by itself, on the organs that it scans, as many steps as in the federation."""
    models = []
    for name, store in setting.cohort.stores.items():
        model = train_alone(setting.run, store, name)
        models.append(PartialModel(model.stream_names, setting.probed(model, model.stream_names)))
    return {"local": mean_of(models), "local-best": best_of(models)}


def single_organ(setting: Setting) -> Arms:
    """One model for every organ, trained on all sites' images of it; `late-fusion` joins their embeddings.

    Each takes as many steps as the sites that have the organ take together in the federation.
    """
    models, fit, test = [], {}, {}
    for stream in setting.run.streams:
        model = train_on_stream(setting, stream)
        models.append(PartialModel((stream,), setting.probed(model, (stream,))))
        fit[stream], test[stream] = (embed_holders(model, store, stream) for store in (setting.train, setting.test))
    return {
        "single-organ": mean_of(models),
        "single-organ-best": best_of(models),
        "late-fusion": _fused(setting, fit, test, with_indicator=False),
        "late-fusion-indicator": _fused(setting, fit, test, with_indicator=True),
    }


def train_on_stream(setting: Setting, stream: str) -> PanModel:
    """Train a model of one stream in one place."""
    having = [store for store in setting.cohort.stores.values() if stream in store.images]
    holders = [some_subjects(store, store.holders(everyone(store), [stream]), streams=(stream,)) for store in having]
    return train_together(setting.run, holders)


def embed_holders(model: PanModel, store: ImageStore, stream: str) -> StreamStatistics:
    """Embeddings of the patients that hold a stream, by a model of it alone."""
    holders = store.holders(everyone(store), [stream])
    return StreamStatistics(holders, embed_store(model, store, holders, (stream,)))


def _fused(setting: Setting, fit: Embeddings, test: Embeddings, *, with_indicator: bool) -> AucOf:
    reference = StatisticsReference.fit([(fit, everyone(setting.train))])
    if with_indicator:
        reference = StatisticsReference({stream: np.zeros_like(mean) for stream, mean in reference.means.items()})

    def features(embeddings: Embeddings, store: ImageStore, there: Streams) -> Features:
        return late_fusion(reference, embeddings, everyone(store), there, with_indicator=with_indicator)

    return setting.labels.probed(
        features(fit, setting.train, tuple(fit)), lambda there: features(test, setting.test, there)
    )


def late_fusion(
    reference: StatisticsReference,
    embeddings: Embeddings,
    indices: NDArray[np.int64],
    there: Streams,
    *,
    with_indicator: bool,
) -> Features:
    """Concatenate single-organ embeddings [N, sum of D], those that are missing filled as `reference` says.

    Args:
        there: Streams that are there; others are missing in every patient.
        with_indicator: Add one column per stream, 1 where it is there.
    """
    joined = reference.features(embeddings, indices, there)
    if not with_indicator:
        return joined
    present = [np.isin(indices, embeddings[stream].rows) & (stream in there) for stream in reference.means]
    return np.concatenate([joined, np.stack(present, axis=1).astype(np.float32)], axis=1)


def zero_imputation(setting: Setting) -> Arms:
    """Train in one place on images in which missing organs are black; nothing tells the model which these are."""
    fill = {name: np.zeros((1, *stream.shape), np.float32) for name, stream in setting.run.streams.items()}
    return {"zero-imputation": _imputed(setting, fill)}


def mean_imputation(setting: Setting) -> Arms:
    """The same with the mean image of the training patients who have the organ."""
    fill = {stream: np.mean(images, axis=0) for stream, images in setting.train.images.items()}
    return {"mean-imputation": _imputed(setting, fill)}


def _imputed(setting: Setting, fill: Mapping[str, NDArray[np.float32]]) -> AucOf:
    filled, names = impute(setting.train, fill), tuple(fill)
    steps = setting.run.train.local_steps * len(setting.cohort.stores)
    train = setting.run.train.model_copy(update={"local_steps": steps})
    model = train_alone(setting.run.model_copy(update={"train": train}), filled, "everyone")

    def features_of(there: Streams) -> Features:
        return embed_store(model, impute(with_streams(setting.test, there), fill), everyone(setting.test), names)

    return setting.labels.probed(embed_store(model, filled, everyone(filled), names), features_of)


def impute(store: ImageStore, fill: Mapping[str, NDArray[np.float32]]) -> ImageStore:
    """Give every patient an image of every stream: its own, or the one that stands for missing ones."""
    images, subjects = {}, everyone(store)
    for stream, image in fill.items():
        images[stream] = np.repeat(image[None], len(subjects), axis=0)
        if stream in store.images:
            images[stream][store.rows[stream]] = store.images[stream]
    return ImageStore(store.subjects, store.splits, images, dict.fromkeys(images, subjects))


def references(setting: Setting) -> Arms:
    """The untrained model, and plain statistics of the images with means in place of missing organs."""
    model = build_model(setting.run)
    measured = [measure_store(store, setting.run.streams) for store in (setting.train, setting.test)]
    reference = StatisticsReference.fit([(measured[0], everyone(setting.train))])
    return {
        "untrained": setting.probed(model, model.stream_names),
        "statistics": setting.labels.probed(
            reference.features(measured[0], everyone(setting.train)),
            lambda there: reference.features(measured[1], everyone(setting.test), there),
        ),
    }


def supervised(setting: Setting) -> Arms:
    """The same network learns all labels from scratch, in one place; its head answers, not a probe."""
    stores = list(setting.cohort.stores.values())
    names, held_out = setting.labels.names, setting.cohort.sites.values()
    validation = join_stores([some_subjects(store, store.indices("val")) for store in stores])
    classifier = MultiLabelClassifier.train(
        setting.run,
        LabelledImages(setting.train, setting.labels.fit),
        LabelledImages(
            validation, np.concatenate([site.values(names, site.store.indices("val")) for site in held_out])
        ),
        steps=setting.run.train.total_steps * len(stores),
    )
    return {"supervised": lambda there: setting.labels.auc(classifier.scores(setting.test, there))}


TRAININGS: Mapping[str, Callable[[Setting], Arms]] = {
    "federated": federated,
    "centralised": centralised,
    "random-masking": random_masking,
    "local": local,
    "single-organ": single_organ,
    "zero-imputation": zero_imputation,
    "mean-imputation": mean_imputation,
    "supervised": supervised,
    "references": references,
}
"""Name of a training -> function that does it, and gives its arms."""


def some_subjects(store: ImageStore, indices: NDArray[np.int64], streams: Sequence[str] | None = None) -> ImageStore:
    """Some patients of a store, in the order given, with all their streams or only those named."""
    images, rows = {}, {}
    for stream in store.images if streams is None else streams:
        at = np.searchsorted(store.rows[stream], indices)
        at = np.minimum(at, len(store.rows[stream]) - 1)
        holders = np.flatnonzero(store.rows[stream][at] == indices)
        images[stream], rows[stream] = store.images[stream][at[holders]], holders
    subjects, splits = ([table[index] for index in indices] for table in (store.subjects, store.splits))
    return ImageStore(tuple(subjects), tuple(splits), images, rows)


def with_streams(store: ImageStore, streams: Streams) -> ImageStore:
    """The same patients with the images of some streams."""
    images = {stream: images for stream, images in store.images.items() if stream in streams}
    return replace(store, images=images, rows={stream: store.rows[stream] for stream in images}, digests={})


def everyone(store: ImageStore) -> NDArray[np.int64]:
    """All patients of a store, as indices."""
    return np.arange(len(store.subjects))


def _common(streams: Streams, there: Streams) -> Streams:
    return tuple(stream for stream in streams if stream in there)
