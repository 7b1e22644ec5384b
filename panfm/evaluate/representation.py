"""Measures of what a model has learned, without labels.

    saliency entropy  how evenly a model uses its streams
    linear CKA        do modalities lie alike in an embedding?   HSIC(XX', YY') / sqrt(HSIC(XX', XX') HSIC(YY', YY'))
    conflict          over pairs of modalities, where the gradients that each alone would ask for point against another
    nmi               2 I(expert; modality) / (H(expert) + H(modality)), expert = the one with an image's largest gate

Rows of X and Y are class means, one per class. With few rows and many features the plain estimate of HSIC is close to
its maximum whatever the features, so the unbiased one is used: unrelated features give about 0, and an answer may be
negative. Sparse gradients have small cosines whatever is learned, so a conflict is to be read beside a control of the
same sparsity (random routing).

Source: Kornblith et al. 2019 (CKA); Song et al. 2012 (HSIC); Yu et al. 2020, PCGrad (gradient conflict); DEX, arXiv
    2605.21861 (specialisation).
Shape legend: N subjects or images, C classes, M modalities, D features, P parameters of a layer, R experts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.training.monitors import entropy


def saliency_entropy(shares: Iterable[float]) -> float:
    """Entropy of the saliency over streams, divided by its maximum: 1 when all weigh alike, 0 when one has all.

    Guarantees:
        one stream: 1.0, since it cannot be uneven.
    """
    share = np.fromiter(shares, dtype=np.float64)
    if len(share) < 2:
        return 1.0
    return entropy(share / share.sum()) / float(np.log(len(share)))


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


@dataclass(frozen=True)
class Conflict:
    """Conflict between the gradients of different modalities; NaN when no two modalities have one."""

    share: float
    """Share of the pairs whose cosine is below minus the margin."""
    size: float
    """Mean over all pairs of max(0, -cosine): both how many disagree and how much."""
    cosine: float
    """Mean over all pairs."""


def gradient_conflict(gradients: NDArray[np.floating], *, margin: float = 0.05) -> Conflict:
    """Conflict between the modalities' gradients of one layer.

    Guarantees:
        idle: a modality without any gradient (no image of it reached these parameters) is in no pair.
        scale: the length of a gradient does not matter.
        not finite: one number that is NaN or infinite makes all of the answer NaN.
    Args:
        gradients: [M, P], one per modality.
        margin: Cosines above minus this are noise and count for no share.
    """
    rows = np.asarray(gradients, dtype=np.float64)
    rows = rows[rows.any(axis=1)]
    if len(rows) < 2 or not np.isfinite(rows).all():
        return Conflict(float("nan"), float("nan"), float("nan"))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
    size = np.maximum(-cosines, 0.0).mean()
    return Conflict(float((cosines < -margin).mean()), float(size), float(cosines.mean()))


def layer_gradients(
    losses: Mapping[str, Callable[[], Tensor]], layers: Sequence[Iterable[Tensor]]
) -> list[NDArray[np.float32]]:
    """Per layer, the gradient of every modality's loss: float32 [M, P], modalities in the mapping's order.

    Guarantees:
        untouched: parameters and their `.grad` stay as they are.
    Args:
        losses: Modality -> its loss, computed when called, so that one graph is alive at a time.
        layers: Parameters of each layer; one that a loss does not reach has gradient 0.
    """
    lists = [list(layer) for layer in layers]
    rows: list[list[NDArray[np.float32]]] = [[] for _ in lists]
    for loss in losses.values():
        flat = [parameter for layer in lists for parameter in layer]
        own = iter(torch.autograd.grad(loss(), flat, allow_unused=True, materialize_grads=True))
        for row, layer in zip(rows, lists, strict=True):
            row.append(torch.cat([next(own).flatten() for _ in layer]).float().cpu().numpy())
    return [np.stack(row) for row in rows]


def expert_modality_nmi(gates: NDArray[np.floating], modality: Sequence[object]) -> float:
    """Normalised mutual information between an image's expert and its modality, of one layer.

    Guarantees:
        range: 0 (the expert says nothing of the modality) to 1 (each tells the other).
        one expert, or one modality: 0.0, since nothing is divided.
        no image, or a gate that is not finite: NaN.
    Args:
        gates: [N, R]; the largest names the expert, the first of equals. Tokens may stand for images.
        modality: N names.
    """
    gates = np.asarray(gates)
    if not len(gates) or not np.isfinite(gates).all():
        return float("nan")
    expert = gates.argmax(axis=1)
    names, index = np.unique(np.asarray(modality), return_inverse=True)
    counts = np.zeros((gates.shape[1], len(names)))
    np.add.at(counts, (expert, index), 1.0)
    joint = counts / len(expert)
    of_expert, of_modality = entropy(joint.sum(axis=1)), entropy(joint.sum(axis=0))
    if not of_expert or not of_modality:
        return 0.0
    return max(0.0, 2.0 * (1.0 - entropy(joint.ravel()) / (of_expert + of_modality)))
