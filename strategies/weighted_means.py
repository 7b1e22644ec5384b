"""Streaming weighted means: `weighted`, and `l-dawa` with a weight for each layer.

    weighted    weight of site k = w_k
    l-dawa      weight of layer l of site k = w_k max(0, cos(g_l, g_l + u_kl))      g: global parameters, u: update

In L-DAWA a layer of a site counts less the further its parameters have turned from the global ones. A layer is one
parameter tensor, or one expert of it. Weights are divided by their sum, layer by layer; the paper leaves that sum below
1, which shrinks the parameters a little each round. A layer of zeros has no direction; its cosine is 1. The server
computes the cosines as a reply arrives, so sites send nothing more and no update is kept.

Source:
    Rehman et al. 2023 (arXiv 2307.07393).
"""

import math
from typing import ClassVar

import numpy as np

from panfm.errors import ProtocolError
from panfm.sharing.groups import Flat, Segments
from panfm.sharing.weights import Weights
from strategies.exact_mean import ExactMean, check_size
from strategies.group_means import GroupSetup


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
