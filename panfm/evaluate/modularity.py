"""Measures of conflict between the gradients of modalities, and of how experts divide modalities.

    conflict      over pairs of modalities, where the gradients that each alone would ask for point against one another
    nmi           2 I(expert; modality) / (H(expert) + H(modality)), expert = the one with an image's largest gate
    experts used  exp H(share of gate mass per expert)

Sparse gradients have small cosines whatever is learned, so a conflict is to be read beside a control of the same
sparsity (random routing).

Source: gradient conflict, Yu et al. 2020 (PCGrad); specialisation, DEX (arXiv 2605.21861).
Shape legend: M modalities, P parameters of a layer, N images, R experts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.evaluate.balance import entropy


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


def experts_used(gates: NDArray[np.floating]) -> float:
    """Effective number of experts of one layer: exp(entropy of their shares of the gate mass [N, R]), 1 to R; NaN
    without images, or where a gate is not finite."""
    mass = np.asarray(gates, dtype=np.float64).sum(axis=0)
    total = mass.sum()
    return float(np.exp(entropy(mass / total))) if total > 0 and np.isfinite(total) else float("nan")
