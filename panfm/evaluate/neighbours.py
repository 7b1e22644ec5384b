"""Nearest neighbours on frozen features.

Shape legend: N subjects whose labels are known, M subjects to predict, D features, K labels.
"""

import numpy as np

from panfm.evaluate.scores import Floats

_NEIGHBOURS, _TEMPERATURE = 10, 0.07


def neighbours_mean(fit: Floats, labels: Floats, test: Floats) -> Floats:
    """Mean of the labels [N, K] of the subjects with the most similar standardised features, weighted by softmax of the
    cosine: [M, K]."""
    centre, scale = fit.mean(axis=0), np.maximum(fit.std(axis=0), 1e-6)
    known, asked = (_unit((features - centre) / scale) for features in (fit, test))
    similar = asked @ known.T
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :_NEIGHBOURS]
    weights = np.exp((np.take_along_axis(similar, nearest, axis=1) - 1.0) / _TEMPERATURE)
    weighted: Floats = np.einsum("nk,nko->no", weights, labels[nearest])
    return weighted / weights.sum(axis=1, keepdims=True)


def _unit(features: Floats) -> Floats:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(lengths, 1e-12), dtype=np.float64)
