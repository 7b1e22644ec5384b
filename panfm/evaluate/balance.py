"""How evenly an embedding uses its dimensions, and a model its streams."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def effective_rank(features: NDArray[np.floating]) -> float:
    """exp(entropy of the normalised singular values) of the centred features [N, D].

    Guarantees:
        range: between 1 (one direction) and min(N - 1, D); 0.0 when nothing varies.
    Source:
        Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    centred = np.asarray(features, dtype=np.float64)
    singular = np.linalg.svd(centred - centred.mean(axis=0), compute_uv=False)
    if not np.any(singular > 1e-12 * max(1.0, float(np.abs(centred).max(initial=0.0)))):
        return 0.0
    return float(np.exp(entropy(singular / singular.sum())))


def saliency_entropy(shares: Iterable[float]) -> float:
    """Entropy of the saliency over streams, divided by its maximum: 1 when all weigh alike, 0 when one has all.

    Guarantees:
        one stream: 1.0, since it cannot be uneven.
    """
    share = np.fromiter(shares, dtype=np.float64)
    if len(share) < 2:
        return 1.0
    return entropy(share / share.sum()) / float(np.log(len(share)))


def entropy(probabilities: NDArray[np.float64]) -> float:
    """Entropy in nats of probabilities that sum to 1."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())
