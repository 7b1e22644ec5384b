"""Similarity of modalities in an embedding: linear CKA between their mean features of the same classes.

    CKA(X, Y) = HSIC(XX', YY') / sqrt(HSIC(XX', XX') HSIC(YY', YY'))

Rows of X and Y are class means, one per class. With few rows and many features the plain estimate of HSIC is close to
its maximum whatever the features, so the unbiased one is used: unrelated features give about 0, and an answer may be
negative.

Source: Kornblith et al. 2019, "Similarity of neural network representations revisited"; Song et al. 2012 (HSIC).
Shape legend: N subjects, C classes, M modalities, D features.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def linear_cka(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Unbiased linear CKA of matched rows [C, D] and [C, D'].

    Guarantees:
        invariant: to rotation, shift and common scale of either.
        same: 1 for features that are equal up to these.
        too little: NaN with fewer than four rows, or when either side has no variance to speak of.
    """
    if len(first) < 4:
        return float("nan")
    one, other = _gram(first), _gram(second)
    scale = _hsic(one, one) * _hsic(other, other)
    return _hsic(one, other) / float(np.sqrt(scale)) if scale > 0 else float("nan")


def modality_cka(
    features: NDArray[np.floating], modality: Sequence[str], classes: Sequence[int]
) -> dict[tuple[str, str], float]:
    """CKA of every pair of modalities, between the mean features of the classes that both have.

    Args:
        features: [N, D].
        modality: N names.
        classes: N classes.
    """
    names, groups = np.asarray(modality), np.asarray(classes)
    means = {name: _class_means(np.asarray(features), names == name, groups) for name in np.unique(names)}
    pairs = {}
    for one, of_one in means.items():
        for other, of_other in means.items():
            if one < other:
                shared = sorted(set(of_one) & set(of_other))
                stacked = (
                    [np.stack([means[group] for group in shared]) for means in (of_one, of_other)] if shared else []
                )
                pairs[str(one), str(other)] = linear_cka(*stacked) if stacked else float("nan")
    return pairs


def _class_means(
    features: NDArray[np.floating], chosen: NDArray[np.bool_], groups: NDArray[np.int64]
) -> dict[int, Floats]:
    return {int(group): features[chosen & (groups == group)].mean(axis=0) for group in np.unique(groups[chosen])}


def _gram(features: NDArray[np.floating]) -> Floats:
    """Products of the centred rows, without those of a row with itself."""
    centred = np.asarray(features, dtype=np.float64) - np.mean(features, axis=0, dtype=np.float64)
    gram: Floats = centred @ centred.T
    np.fill_diagonal(gram, 0.0)
    return gram


def _hsic(one: Floats, other: Floats) -> float:
    """Unbiased HSIC of two Gram matrices without diagonal, up to a constant factor."""
    rows = len(one)
    sums = one.sum() * other.sum() / ((rows - 1) * (rows - 2))
    return float((one * other).sum() + sums - 2.0 * (one.sum(axis=0) @ other.sum(axis=0)) / (rows - 2))
