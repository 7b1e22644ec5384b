"""Means of a group of parameters: the interface, the choice by `sharing.mean`, and the five built-in means.

    weighted           weight of site k = w_k
    l-dawa             weight of layer l of site k = w_k max(0, cos(g_l, g_l + u_kl))
    median             the middle value of each number; one vote per site
    trimmed            each number: without the share `trim` of the sites at each end, rounded up; the rest by weight
    geometric-median   the point with the least weighted distance to the updates, each as a whole

with g the global parameters, u the update of a site, w its weight.

To add a mean, write a class with the methods of `GroupMean` and a line in `MEANS` (panfm/registry.py). A mean that
needs all updates of a round at once subclasses `BufferedMean`; others add them to a sum as they arrive, like
`WeightedMean`.

L-DAWA: a layer of a site counts less the further its parameters have turned from the global ones. A layer is one
parameter tensor, or one expert of it. Weights are divided by their sum, layer by layer; the paper leaves that sum below
1, which shrinks the parameters a little each round. A layer of zeros has no direction; its cosine is 1. The server
computes the cosines as a reply arrives, so sites send nothing more and no update is kept.

Robust means: a minority of wrong updates cannot move the last three far. They keep all updates of a round in memory. A
site states its own weight, so sites are cut by one vote each. No site has more than `federation.max-share` of the
weight (weight_caps.py): of the total in the geometric median, which withstands wrong updates below half of it, and of
what remains of each number in the trimmed mean. With few and unlike sites an honest one looks like an outlier. None of
these changes anything with fewer than three sites; with two the median is their plain mean. Flower's FedMedian and
FedTrimmedAvg want the same arrays from all sites, take no weights, and are methods rather than functions.

Source:
    Rehman et al. 2023 (arXiv 2307.07393), L-DAWA; Yin et al. 2018 (arXiv 1803.01498), median and trimmed mean; Pillutla
    et al. 2022 (arXiv 1912.13445), Algorithm 2 (smoothed Weiszfeld), geometric median.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from panfm.config.sharing import SharingConfig
from panfm.config.site_dp import SiteDpConfig
from panfm.config.training import TrainConfig
from panfm.errors import ProtocolError
from panfm.registry import MEANS
from panfm.sharing.groups import Flat, Segments
from panfm.sharing.weights import Weights
from strategies.exact_mean import USUAL, ExactMean, Votes, check_size
from strategies.weight_caps import FEWEST, capped_weights

_CHUNK = 1 << 14
_SMOOTHING = 1e-6
_ITERATIONS = 100


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


class BufferedMean(ABC):
    """Base of means that are computed once all updates of a round are there; a subclass defines `combine`.

    Guarantees:
        order: contributions are sorted by content first, so their order of arrival does not matter.
    """

    uses_weights: ClassVar[bool] = True

    def __init__(self, setup: GroupSetup) -> None:
        """Create a mean that has no contributions yet."""
        self.setup = setup
        self._guard = ExactMean(setup.segments, weight_limit=setup.weight_limit, space=setup.space, votes=setup.votes)
        """Checks contributions, computes their norms, counts their signs."""
        self._contributions: list[tuple[Weights, bytes, Flat]] = []

    @abstractmethod
    def combine(self, updates: Sequence[Flat], weights: Sequence[float]) -> Flat:
        """Return the mean of the updates, float32; all weights are above 0."""

    def add(self, update: Flat, weights: Weights) -> float:
        """Keep one site's update. Raises ProtocolError as `ExactMean.add` does."""
        norm = self._guard.add(update, weights)
        self._contributions.append((weights, hashlib.sha256(update.data).digest(), update))
        return norm

    def remove(self, update: Flat, weights: Weights) -> None:
        """Undo the last `add`."""
        self._guard.remove(update, weights)
        self._contributions.pop()

    def mean(self) -> Flat | None:
        """Return the mean, segment by segment; None if no weight was above 0, and -0.0 in segments that have none."""
        contributions = sorted(self._contributions, key=lambda contribution: contribution[:2])
        if not any(any(weights) for weights, _, _ in contributions):
            return None
        parts, start = [], 0
        for length, which in self.setup.segments:
            segment = slice(start, start := start + length)
            pairs = [(update[segment], weights[which]) for weights, _, update in contributions if weights[which]]
            parts.append(self.combine(*zip(*pairs, strict=True)) if pairs else np.full(length, -0.0, np.float32))
        return np.concatenate(parts)


class CoordinateMedian(BufferedMean):
    """Coordinate-wise median of the updates."""

    uses_weights = False

    def combine(self, updates: Sequence[Flat], weights: Sequence[float]) -> Flat:
        """Return `coordinate_median` of the updates."""
        return coordinate_median(updates)


class TrimmedMean(BufferedMean):
    """Coordinate-wise mean of the updates, without the most extreme sites in each coordinate."""

    def combine(self, updates: Sequence[Flat], weights: Sequence[float]) -> Flat:
        """Return `trimmed_mean` of the updates."""
        return trimmed_mean(updates, weights, trim=self.setup.trim, max_share=self.setup.max_share)


class GeometricMedian(BufferedMean):
    """Geometric median: the point with the least sum of weighted distances to the updates."""

    def combine(self, updates: Sequence[Flat], weights: Sequence[float]) -> Flat:
        """Return `geometric_median` of the updates, under capped weights."""
        return geometric_median(updates, capped_weights(weights, self.setup.max_share))


def coordinate_median(updates: Sequence[Flat]) -> Flat:
    """Coordinate-wise median of the updates, float32."""
    return np.concatenate([np.median(stack, axis=0) for stack in _stacks(updates)]).astype(np.float32)


def trimmed_mean(updates: Sequence[Flat], weights: Sequence[float], *, trim: float, max_share: float = 1.0) -> Flat:
    """Coordinate-wise mean without the most extreme sites, float32; at least one site is left in each coordinate."""
    num = len(updates)
    max_share = max_share if num >= FEWEST else 1.0
    cut = min(math.ceil(trim * num), (num - 1) // 2)
    shares = np.asarray(weights, np.float64)
    parts = []
    for stack in _stacks(updates):
        kept = np.argsort(stack, axis=0, kind="stable")[cut : num - cut]
        lowered = _capped(shares[kept], max_share)
        parts.append(np.average(np.take_along_axis(stack, kept, axis=0), axis=0, weights=lowered))
    return np.concatenate(parts).astype(np.float32)


def _capped(weights: NDArray[np.float64], max_share: float) -> NDArray[np.float64]:
    """Weights [sites, numbers], for each number lowered to its water level."""
    num = len(weights)
    share = max(max_share, 1.0 / num)
    largest_first = -np.sort(-weights, axis=0)
    level = np.full(weights.shape[1:], np.inf)
    for num_lowered in range(1, num):
        rest = largest_first[num_lowered:].sum(axis=0)
        if num_lowered * share < 1.0:
            level = np.minimum(
                level, np.maximum(share * rest / (1.0 - num_lowered * share), largest_first[num_lowered])
            )
    return np.minimum(weights, level)


def geometric_median(updates: Sequence[Flat], weights: Sequence[float]) -> Flat:
    """Point z that minimises sum_k w_k |z - u_k|, to a millionth of the spread of the updates."""
    shares = np.asarray(weights, np.float64) / sum(weights)
    centre = _combine(updates, shares)
    spread = float(_distances(updates, centre) @ shares)
    for _ in range(_ITERATIONS if spread else 0):
        pull = shares / np.maximum(_distances(updates, centre), _SMOOTHING * spread)
        moved = _combine(updates, pull / pull.sum())
        centre, step = moved, float(np.linalg.norm(moved - centre))
        if step <= _SMOOTHING * spread:
            break
    return centre.astype(np.float32)


def _stacks(updates: Sequence[Flat]) -> Iterator[NDArray[np.float64]]:
    """Yield all updates, some numbers at a time: [sites, numbers]."""
    for start in range(0, max(len(updates[0]), 1), _CHUNK):
        yield np.stack([update[start : start + _CHUNK] for update in updates]).astype(np.float64)


def _combine(updates: Sequence[Flat], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([shares @ stack for stack in _stacks(updates)])


def _distances(updates: Sequence[Flat], centre: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray([np.linalg.norm(update - centre) for update in updates])
