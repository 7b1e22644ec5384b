"""Survival: the loss of a Cox model, the concordance of its risks, and a Cox regression on frozen features.

A patient has a time and an event: 1 if the event came at this time, 0 if the patient was last seen without it then
(censored). A Cox model gives every patient a log hazard, up to a constant; a greater one means an earlier event.

Shape legend: N patients, R resamples, D features.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.errors import DataError
from panfm.evaluate.scores import Floats
from panfm.seeds import numpy_generator

_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Weights of the mean square of the coefficients, relative to the mean loss of an event."""
_FOLDS = 5
_MIN_PATIENTS = 10


def cox_loss(log_hazards: Tensor, events: Tensor, times: Tensor) -> Tensor:
    """Mean negative log partial likelihood of the events; 0, with a gradient of 0, without events.

    Each event is compared with all patients whose time is not before it (Breslow's rule for equal times).

    Args:
        log_hazards: [N]
        events: [N], 1 or 0.
        times: [N]
    Source:
        Cox 1972, "Regression models and life-tables"; Katzman et al. 2018 (DeepSurv), arXiv 1606.00931, equation 4.
    """
    at_risk = times[None, :] >= times[:, None]
    of_set = torch.where(at_risk, log_hazards[None, :], -torch.inf).logsumexp(dim=1)
    return ((of_set - log_hazards) * events).sum() / events.sum().clamp_min(1.0)


def concordance(risks: Floats, events: NDArray[np.bool_], times: Floats, counts: Floats) -> Floats:
    """Harrell's C per resample [R]: share of the pairs, of whom the one with the earlier event has the greater risk.

    A pair counts if the earlier time is that of an event; equal risks count half, pairs of equal times are left out.

    Args:
        risks, events, times: [N]
        counts: [R, N], see `draw_counts`.
    Guarantees:
        no pair: NaN in a resample without a pair that counts.
    """
    earlier = ((times[:, None] < times[None, :]) & events[:, None]).astype(np.float64)
    right = earlier * ((risks[:, None] > risks[None, :]) + 0.5 * (risks[:, None] == risks[None, :]))
    pairs, won = (((counts @ matrix) * counts).sum(axis=1) for matrix in (earlier, right))
    share: Floats = np.divide(won, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return share


@dataclass(frozen=True)
class CoxRegression:
    """Linear log hazards of standardised features."""

    centre: Floats
    scale: Floats
    weights: Floats

    def risks(self, features: Floats) -> Floats:
        """Log hazards [N] of features [N, D], 0 at the mean of the patients of the fit."""
        log_hazards: Floats = ((features - self.centre) / self.scale) @ self.weights
        return log_hazards


def fit_cox(features: Floats, events: Floats, times: Floats) -> CoxRegression:
    """Fit a Cox regression with a ridge penalty.

    Of the penalties the one with the greatest mean concordance over five folds is chosen, the strongest of equal ones.

    Args:
        features: [N, D]
        events, times: [N]
    Raises:
        DataError: fewer than ten patients, or none with an event.
    """
    if len(features) < _MIN_PATIENTS or not events.any():
        given = f"{len(features)} patients with {int(events.sum())} events"
        raise DataError(f"probe: {given}, expected at least {_MIN_PATIENTS} with an event")
    folds = numpy_generator(0, "cox-folds").permutation(len(features)) % _FOLDS
    best, chosen = -np.inf, _PENALTIES[-1]
    for penalty in reversed(_PENALTIES):
        values = []
        for fold in range(_FOLDS):
            fit, test = folds != fold, folds == fold
            risks = _fit(features[fit], events[fit], times[fit], penalty).risks(features[test])
            values.append(concordance(risks, events[test] == 1.0, times[test], np.ones((1, int(test.sum()))))[0])
        mean = np.nanmean(values) if np.isfinite(values).any() else -np.inf
        if mean > best:
            best, chosen = float(mean), penalty
    return _fit(features, events, times, chosen)


def _fit(features: Floats, events: Floats, times: Floats, penalty: float) -> CoxRegression:
    """Fit with one penalty; the weights are combinations of the patients' features, of which there may be fewer."""
    centre, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
    standard = (features - centre) / scale
    left, sizes, right = np.linalg.svd(standard, full_matrices=False)
    inputs, event, time = (torch.from_numpy(values) for values in (left * sizes, events, times))
    weights = torch.zeros(inputs.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = cox_loss(inputs @ weights, event, time) + 0.5 * penalty * weights.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return CoxRegression(centre, scale, right.T @ weights.detach().numpy())
