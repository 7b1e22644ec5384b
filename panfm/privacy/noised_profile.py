"""A site's saliency profile under privacy: one noised sum over all its patients per round.

    V = sum_j (a_j, e_j) + N(0, (z sqrt 2)^2)

with a_j the shares of patient j over the streams, and e_j an equal split over those that j has. Both are non-negative
and sum to 1. The profile is V's first half over its second: what streams get relative to an equal split, both with one
standard deviation of the noise added, so that it tends to 1 where the noise leaves nothing to tell. A share is at most
1 and an equal split at least 1/S, so a profile without noise lies in [0, S]; a noised one is cut to that.

Patients are taken one at a time, as in the private step.

Shape legend: S streams.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.data.store import Batch, ImageStore
from panfm.privacy.mechanisms import SALIENCY_SENSITIVITY
from panfm.privacy.patient_gradients import one_patient, patients_with_streams
from panfm.privacy.randomness import with_noise
from panfm.training.trainer import Trainer


def noisy_profile(trainer: Trainer, store: ImageStore, indices: NDArray[np.int64]) -> Tensor:
    """Saliency per stream relative to an equal split [S], from 0 to the number of streams that the site holds."""
    private = trainer.run.privacy
    assert private is not None
    total = saliency_sum(trainer, store, indices)
    deviation = private.statistics_noise * SALIENCY_SENSITIVITY
    shares, equal = with_noise(total, deviation).clamp_min(0.0) + deviation
    most = sum(name in store.images for name in trainer.model.stream_names)
    return (shares / equal).clamp_max(most).float().to(trainer.device)


@torch.no_grad()
def saliency_sum(trainer: Trainer, store: ImageStore, indices: NDArray[np.int64]) -> Tensor:
    """Sum over patients of shares and equal splits, float64 [2, S].

    Guarantees:
        bounded: leaving a patient out changes it by at most sqrt 2, in L2.
    """
    names = trainer.model.stream_names
    total = torch.zeros(2, len(names), dtype=torch.float64)
    for index in patients_with_streams(store, indices, names):
        vector = saliency_vector(trainer, one_patient(store, int(index), trainer.device))
        norm = float(vector.norm())
        if math.isfinite(norm):
            total += vector * min(1.0, SALIENCY_SENSITIVITY / norm)
    return total


def saliency_vector(trainer: Trainer, maps: Batch) -> Tensor:
    """Shares and equal split of one patient, float64 [2, S]; from this patient alone, to the bit."""
    full = trainer.teacher.encode(maps, saliency=trainer.run.masking.saliency)
    shares, present = (value[0].double().cpu() for value in trainer.stream_saliency(full))
    return torch.stack([shares, present / present.sum()])
