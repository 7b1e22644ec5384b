"""Site-level privacy: the mean over sites of whole updates, each clipped to one norm, plus noise.

    S = sum_k u_k min(1, C / ||u_k||) + N(0, (z C)^2),      ||.|| over all groups that site k sends, together
    step of group g = S_g / n_g,                            n_g sites train g

Sites send unlike groups: u_k is zero in those that site k does not train. If a site's updates are zeroed out, S moves
by at most C, in L2 over all groups; so group g alone moves by at most C / n_g, where n_g does not change, for who
trains what is public. Noise of z C on the whole of S is noise of z C / n_g on the mean of g.

Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models" (there with sampled users).
"""

from collections.abc import Mapping

import numpy as np
import torch

from panfm.privacy.randomness import with_noise
from panfm.sharing.groups import Flat

_CHUNK = 1 << 16
_LEAST = float(np.finfo(np.float32).tiny)
"""Below it float32 has few digits."""


def clip_update(updates: Mapping[str, Flat], clip_norm: float) -> dict[str, Flat]:
    """One site's updates, float32, scaled to a joint L2 norm of at most `clip_norm`.

    Guarantees:
        bounded: the norm over all groups is at most clip_norm (1 + 1e-6).
        poison: an update that holds a number that is not finite, or is 2^126 times too long, becomes zero.
    """
    norm = float(np.sqrt(sum(map(_squared_norm, updates.values()))))
    if not norm * _LEAST <= clip_norm:
        return {group: np.zeros_like(update) for group, update in updates.items()}
    factor = np.float32(min(1.0, clip_norm / norm)) if norm else np.float32(1.0)
    return {group: update * factor for group, update in updates.items()}


def noised_mean(mean: Flat, num_sites: int, *, clip_norm: float, noise: float) -> Flat:
    """The mean of a group's clipped updates plus noise, float32.

    Args:
        mean: Over `num_sites` sites, all with the same weight.
        noise: Standard deviation of the noise on the sum, in clip norms.
    """
    deviation = noise * clip_norm / num_sites
    return with_noise(torch.from_numpy(mean.astype(np.float64)), deviation).float().numpy()


def _squared_norm(update: Flat) -> float:
    chunks = (update[start : start + _CHUNK].astype(np.float64) for start in range(0, len(update), _CHUNK))
    return sum(float(np.dot(chunk, chunk)) for chunk in chunks)
