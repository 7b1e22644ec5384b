"""A site's saliency profile under privacy: one noised sum over all its patients per round.

    V = sum_j (a_j, e_j) + N(0, (z sqrt 2)^2)

with a_j the shares of patient j over the streams, and e_j an equal split over those that j has. Both are non-negative
and sum to 1. The profile is V's first half over its second: what streams get relative to an equal split, both with one
standard deviation of the noise added, so that it tends to 1 where the noise leaves nothing to tell. A share is at most
1 and an equal split at least 1/S, so a profile without noise lies in [0, S]; a noised one is cut to that.

Shape legend: B patients of a chunk, S streams.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.data.store import ImageStore
from panfm.objectives import Learner
from panfm.objectives.loop import stream_saliency
from panfm.privacy.mechanisms import SALIENCY_SENSITIVITY
from panfm.privacy.patients import chunks_of_equals
from panfm.privacy.randomness import with_noise


def noisy_profile(learner: Learner, store: ImageStore, indices: NDArray[np.int64]) -> Tensor:
    """Saliency per stream relative to an equal split [S], from 0 to the number of streams that the site holds."""
    private = learner.run.privacy
    assert private is not None
    total = saliency_sum(learner, store, indices)
    deviation = private.statistics_noise * SALIENCY_SENSITIVITY
    shares, equal = with_noise(total, deviation).clamp_min(0.0) + deviation
    most = sum(name in store.images for name in learner.model.stream_names)
    return (shares / equal).clamp_max(most).float().to(learner.device)


@torch.no_grad()
def saliency_sum(learner: Learner, store: ImageStore, indices: NDArray[np.int64]) -> Tensor:
    """Sum over patients of shares and equal splits, float64 [2, S].

    Guarantees:
        bounded: leaving a patient out changes it by at most sqrt 2, in L2.
    """
    names = learner.model.stream_names
    total = torch.zeros(2, len(names), dtype=torch.float64)
    for chunk in chunks_of_equals(store, indices, names, 64):
        maps = store.batch(chunk).to(learner.device)
        full = learner.teacher.encode(maps, saliency=learner.run.masking.saliency)
        shares, present = (value.double().cpu() for value in stream_saliency(learner, full))
        vectors = torch.stack([shares, present / present.sum(dim=1, keepdim=True)], dim=1)
        norm = vectors.flatten(1).norm(dim=1)
        kept = norm.isfinite()
        factor = (SALIENCY_SENSITIVITY / norm[kept]).clamp_max(1.0)
        total += (vectors[kept] * factor[:, None, None]).sum(dim=0)
    return total
