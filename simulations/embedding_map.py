"""Computes the report's map of embeddings: some subjects in two dimensions, by principal components and by t-SNE.

At most 300 subjects, as many from each site as from the held-out ones, so that the map costs about two seconds whatever
the cohort's size.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from panfm.anatomy import parse_stream
from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.evaluate.embed import embed_store
from panfm.evaluate.probe_labels import LabelledStore
from panfm.models import PanModel
from panfm.report.report_data import EmbeddingMap
from panfm.seeds import derive_seed, numpy_generator
from simulations.cohorts.opened import OpenedCohort

HELD_OUT = "held out"
_MOST_SUBJECTS = 300
_MOST_LABELS = 2
_LEAST_SUBJECTS = 10
_PERPLEXITY = 30
_STEPS = 500


def embedding_map(
    run: RunConfig, model: PanModel, opened: OpenedCohort, best_labels: Sequence[str]
) -> EmbeddingMap | None:
    """Embed training subjects of the sites and held-out subjects, and lay them out in two dimensions.

    Args:
        best_labels: Labels by which subjects are coloured, the most wanted first; two are kept.
    Returns:
        None if there are fewer than ten subjects, or all embeddings are equal.
    """
    places = [(place, "train", place.name) for place in opened.sites.values()]
    places.append((opened.holdout, "test", HELD_OUT))
    most = _MOST_SUBJECTS // len(places)
    drawn = []
    for place, split, name in places:
        holders = place.store.holders(place.store.indices(split), model.stream_names)
        drawn.append((place, drawn_subjects(run, holders, most, "embedding", name), name))
    known = [[stream for stream in model.stream_names if stream in place.store.images] for place, _, _ in drawn]
    features = np.concatenate(
        [embed_store(model, place.store, at, names) for (place, at, _), names in zip(drawn, known, strict=True)]
    )
    spread = features.std(axis=0)
    if len(features) < _LEAST_SUBJECTS or not spread.any():
        return None
    scaled = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    pca, explained, tsne = _layouts(scaled, derive_seed(run.seed, "report", "t-sne") % 2**32)
    labels = [name for name in best_labels if not opened.labels[name].is_number][:_MOST_LABELS]
    return EmbeddingMap(
        _rounded(pca),
        explained,
        _rounded(tsne),
        [name for _, at, name in drawn for _ in at],
        [organs for place, at, _ in drawn for organs in _organs(place.store, at, model.stream_names)],
        {name: [value for place, at, _ in drawn for value in _answers(place, name, at)] for name in labels},
    )


def drawn_subjects(run: RunConfig, subjects: NDArray[np.int64], most: int, *purpose: str) -> NDArray[np.int64]:
    """Draw at most so many subjects by the run's seed and a purpose, in their order."""
    generator = numpy_generator(run.seed, "report", *purpose)
    return np.sort(generator.choice(subjects, min(most, len(subjects)), replace=False))


def _layouts(
    features: NDArray[np.float32], seed: int
) -> tuple[NDArray[np.float64], tuple[float, float], NDArray[np.float64]]:
    """Compute principal components [N, 2], their shares of the variance, and t-SNE coordinates [N, 2]."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=1):
        components = PCA(n_components=2, svd_solver="full").fit(features)
        perplexity = min(_PERPLEXITY, (len(features) - 1) // 3)
        tsne = TSNE(perplexity=perplexity, init="pca", max_iter=_STEPS, random_state=seed, n_jobs=1).fit_transform(
            features
        )
    first, second = (float(share) for share in components.explained_variance_ratio_)
    return components.transform(features), (first, second), tsne


def _rounded(places: NDArray[np.float64]) -> list[tuple[float, float]]:
    return [(round(float(x), 3), round(float(y), 3)) for x, y in places]


def _organs(store: ImageStore, at: NDArray[np.int64], streams: Sequence[str]) -> list[str]:
    """Organs of each subject as text, such as `brain, heart`, in the order of the streams."""
    holds = {stream: set(store.rows[stream].tolist()) for stream in streams if stream in store.images}
    return [
        ", ".join(dict.fromkeys(parse_stream(stream)[0] for stream, rows in holds.items() if subject in rows))
        for subject in at.tolist()
    ]


def _answers(place: LabelledStore, label: str, at: NDArray[np.int64]) -> list[int | None]:
    return [int(value) if np.isfinite(value) else None for value in place.values([label], at)[:, 0]]
