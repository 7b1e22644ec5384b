"""Monitors: numbers that tell whether a model still tells patients apart. They draw and change nothing.

    effective-rank     exp H(s / sum s), s the singular values of the centred features; 1 if they lie on a line
    feature-deviation  sqrt(D) x mean over the features of their deviation, of rows of length 1; 0 if all rows are equal
    experts-used       exp H(share of gate mass per expert), mean over the layers; 1 if one expert gets all
    teacher-entropy    mean entropy of the `dino` teacher's answers, in shares of its maximum; 1 if it prefers nothing
    presence-leakage   share of the variance on the val split that only the organs present explain (round_monitors.py)
    validation-auc     mean AUC of a probe of the site's own labels on its val split (panfm/site/round_monitors.py)

But for the last two, features are the teacher's CLS tokens of the round's last batch, every view a row.

Source: Roy & Vetterli 2007 (effective rank); Chen & He 2021, SimSiam (deviation); Caron et al. 2021, DINO (entropy).
Shape legend: N rows, D features, R experts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

NAMES = ("effective-rank", "feature-deviation", "teacher-entropy", "experts-used", "presence-leakage", "validation-auc")


def feature_monitors(features: NDArray[np.floating]) -> dict[str, float]:
    """Effective rank and deviation of features [N, D]; empty for fewer than two rows, or if one is not finite."""
    rows = np.asarray(features, dtype=np.float64)
    if len(rows) < 2 or not np.isfinite(rows).all():
        return {}
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    deviation = float(unit.std(axis=0).mean() * np.sqrt(rows.shape[1]))
    return {"effective-rank": effective_rank(rows), "feature-deviation": deviation}


def expert_monitors(gate_mass: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean number of experts in use over the layers, by layer's gate mass; empty without any."""
    used = [experts_used(np.array([mass])) for mass in gate_mass.values()]
    return {"experts-used": float(np.mean(used))} if used and np.isfinite(used).all() else {}


def effective_rank(features: NDArray[np.floating]) -> float:
    """exp(entropy of the normalised singular values) of the centred features [N, D].

    Guarantees:
        range: between 1 (one direction) and min(N - 1, D); 0.0 when nothing varies.
    """
    centred = np.asarray(features, dtype=np.float64)
    singular = np.linalg.svd(centred - centred.mean(axis=0), compute_uv=False)
    if not np.any(singular > 1e-12 * max(1.0, float(np.abs(centred).max(initial=0.0)))):
        return 0.0
    return float(np.exp(entropy(singular / singular.sum())))


def experts_used(gates: NDArray[np.floating]) -> float:
    """Effective number of experts of one layer: exp(entropy of their shares of the gate mass [N, R]), 1 to R; NaN
    without images, or where a gate is not finite."""
    mass = np.asarray(gates, dtype=np.float64).sum(axis=0)
    total = mass.sum()
    return float(np.exp(entropy(mass / total))) if total > 0 and np.isfinite(total) else float("nan")


def entropy(probabilities: NDArray[np.float64]) -> float:
    """Entropy in nats of probabilities that sum to 1."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())
