"""L-DAWA: within a group, each layer of a site weighs less the further its parameters have turned from the global ones.

    weight of layer l of site k = w_k max(0, cos(g_l, g_l + u_kl))        g: global parameters, u: update

A layer is one parameter tensor, or one expert of it. Weights are divided by their sum, layer by layer; the paper leaves
its sum below 1, which shrinks the parameters a little each round. A layer of zeros has no direction: its cosine is 1.
The server works the cosines out as a reply arrives, so nothing more travels and nothing is kept.

Source:
    Rehman et al. 2023 (arXiv 2307.07393).
"""

import math

import numpy as np

from panfm.errors import ProtocolError
from panfm.sharing.groups import Flat, Segments
from panfm.sharing.mean import ExactMean, Votes, check_size
from panfm.sharing.weights import Weights


class DivergenceMean:
    """`ExactMean` with a weight per layer; streaming and order-independent as it is."""

    def __init__(
        self,
        layers: Segments,
        start: Flat,
        *,
        weight_limit: float,
        max_share: float = 1.0,
        usual: float,
        space: Flat | None = None,
        votes: Votes | None = None,
    ) -> None:
        """An empty mean.

        Args:
            layers: Length of each layer, and which of a contribution's weights counts for it.
            start: Global parameters at the start of the round.
            weight_limit: No weight sums to more than this over all contributions.
            max_share: As for `ExactMean`, of each layer's weights.
            usual: Few numbers of an update lie further from 0 than this.
            space: As for `ExactMean`.
            votes: As for `ExactMean`.
        """
        self._start = start
        self._whose = [which for _, which in layers]
        self._edges = np.cumsum([length for length, _ in layers])[:-1]
        segments = tuple((length, index) for index, (length, _) in enumerate(layers))
        self._mean = ExactMean(
            segments, weight_limit=weight_limit, max_share=max_share, usual=usual, space=space, votes=votes
        )

    def add(self, update: Flat, weights: Weights) -> float:
        """As `ExactMean.add`."""
        if len(weights) != (expected := 1 + max(self._whose, default=0)):
            raise ProtocolError(f"{len(weights)} weights, expected {expected}")
        check_size(update, len(self._start))
        return self._mean.add(update, self._turned(update, weights))

    def take_off(self, update: Flat, weights: Weights) -> None:
        """As `ExactMean.take_off`."""
        self._mean.take_off(update, self._turned(update, weights))

    def mean(self) -> Flat | None:
        """As `ExactMean.mean`."""
        return self._mean.mean()

    def _turned(self, update: Flat, weights: Weights) -> Weights:
        """A weight per layer."""
        with np.errstate(over="ignore", invalid="ignore"):  # what it comes of is refused
            turned = map(_cosine, np.split(self._start, self._edges), np.split(self._start + update, self._edges))
            return tuple(weights[which] * cosine for which, cosine in zip(self._whose, turned, strict=True))


def _cosine(one: Flat, other: Flat) -> float:
    """What is not finite has no direction either: `ExactMean` refuses it."""
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return min(max(float(np.dot(one, other)) / norms, 0.0), 1.0) if 0.0 < norms < math.inf else 1.0
