"""The mean of one group: its interface, the choice by `sharing.mean`, and the means that stream.

    weighted    weight of site k = w_k
    l-dawa      weight of layer l of site k = w_k max(0, cos(g_l, g_l + u_kl))      g: global parameters, u: update

To add a mean, write a class with the methods of `GroupMean` and a line in `MEANS` (panfm/registry.py). A mean that
needs all updates of a round at once subclasses `BufferedMean` (robust_means.py); others add them to a sum as they
arrive, like `WeightedMean`.

In L-DAWA a layer of a site counts less the further its parameters have turned from the global ones. A layer is one
parameter tensor, or one expert of it. Weights are divided by their sum, layer by layer; the paper leaves that sum below
1, which shrinks the parameters a little each round. A layer of zeros has no direction; its cosine is 1. The server
computes the cosines as a reply arrives, so sites send nothing more and no update is kept.

Source:
    Rehman et al. 2023 (arXiv 2307.07393).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from panfm.config.sharing import SharingConfig
from panfm.config.site_dp import SiteDpConfig
from panfm.config.training import TrainConfig
from panfm.errors import ProtocolError
from panfm.registry import MEANS
from panfm.sharing.groups import Flat, Segments
from panfm.sharing.weights import Weights
from strategies.exact_mean import USUAL, ExactMean, Votes, check_size


@dataclass(frozen=True)
class GroupSetup:
    """Settings of a group's mean, known before the first update of a round arrives."""

    segments: Segments
    """Which of a site's weights counts for which numbers."""
    weight_limit: float
    """Largest sum of one weight over all sites."""
    layers: Segments = ()
    """Segments of a packed group, one per parameter tensor, or one per expert of a stacked tensor."""
    start: Flat | None = None
    """Global parameters at the start of the round, packed."""
    max_share: float = 1.0
    """Largest share of the weight that one of three sites or more has."""
    usual: float = USUAL
    """Few numbers of an update lie further from 0 than this."""
    trim: float = 0.0
    """`sharing.trim`."""
    space: Flat | None = None
    """Memory of the group's size, float32, that the mean may use and return."""
    votes: Votes | None = None
    """Where the signs of the updates are counted."""


class GroupMean(Protocol):
    """Mean of the updates of one group in one round.

    Guarantees:
        order: any permutation of the same contributions gives the same bits.
    """

    uses_weights: ClassVar[bool]
    """Whether a site's weight changes the result; if not, all sites that trained the group have one vote."""

    def __init__(self, setup: GroupSetup) -> None:
        """Create a mean without contributions."""

    def add(self, update: Flat, weights: Weights) -> float:
        """Add one site's update, and return its L2 norm. Raises ProtocolError, and then leaves the mean as it was."""

    def remove(self, update: Flat, weights: Weights) -> None:
        """Undo the last `add`, to the bit; the arguments are the same."""

    def mean(self) -> Flat | None:
        """Return the mean, float32; None if no weight was above 0, and -0.0 for experts that have none. Called once."""


def make_mean(sharing: SharingConfig, group: str, setup: GroupSetup) -> GroupMean:
    """Create the mean that the run description names for a group."""
    mean: GroupMean = MEANS.load(sharing.mean_of(group))(setup)
    return mean


def usual_size(train: TrainConfig, site_dp: SiteDpConfig | None) -> float:
    """Size that few numbers of an update exceed: two learning rates per local step, about what AdamW moves a parameter
    at most; under site-level privacy a sixteenth of the clip norm."""
    if site_dp:
        return site_dp.clip_norm / 16.0
    return 2.0 * train.learning_rate * train.local_steps


class WeightedMean(ExactMean):
    """Exact mean, weighted by how much each site trained the group."""

    uses_weights: ClassVar[bool] = True

    def __init__(self, setup: GroupSetup, segments: Segments | None = None) -> None:
        """Create a mean without contributions.

        Args:
            segments: In place of the group's own.
        """
        super().__init__(
            segments or setup.segments,
            weight_limit=setup.weight_limit,
            max_share=setup.max_share,
            usual=setup.usual,
            space=setup.space,
            votes=setup.votes,
        )


class LayerwiseMean(WeightedMean):
    """Exact mean whose weights are lowered layer by layer (L-DAWA)."""

    def __init__(self, setup: GroupSetup) -> None:
        """Create a mean without contributions; `setup` has layers and start."""
        assert setup.start is not None
        super().__init__(setup, tuple((length, index) for index, (length, _) in enumerate(setup.layers)))
        self._start = setup.start
        self._weight_of_layer = [which for _, which in setup.layers]
        self._layer_edges = np.cumsum([length for length, _ in setup.layers])[:-1]

    def add(self, update: Flat, weights: Weights) -> float:
        """Add one site's update with a weight for each layer; see `ExactMean.add`."""
        if len(weights) != (expected := 1 + max(self._weight_of_layer, default=0)):
            raise ProtocolError(f"{len(weights)} weights, expected {expected}")
        check_size(update, len(self._start))
        return super().add(update, self._layer_weights(update, weights))

    def remove(self, update: Flat, weights: Weights) -> None:
        """Undo the last `add`."""
        super().remove(update, self._layer_weights(update, weights))

    def _layer_weights(self, update: Flat, weights: Weights) -> Weights:
        with np.errstate(over="ignore", invalid="ignore"):  # ExactMean refuses such updates
            starts, ends = np.split(self._start, self._layer_edges), np.split(self._start + update, self._layer_edges)
            cosines = map(_cosine, starts, ends)
            return tuple(weights[which] * cosine for which, cosine in zip(self._weight_of_layer, cosines, strict=True))


def _cosine(one: Flat, other: Flat) -> float:
    """Cosine of two layers, at least 0; 1 if one is zero or not finite."""
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return min(max(float(np.dot(one, other)) / norms, 0.0), 1.0) if 0.0 < norms < math.inf else 1.0
