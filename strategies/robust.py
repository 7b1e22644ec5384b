"""Means that a minority of wrong updates cannot carry far.

    median             the middle value of every number; one vote per site
    trimmed            every number: without the share `trim` of the sites at each end, rounded up; the rest by weight
    geometric-median   the point with the least weighted distance to the updates of a group as wholes

A site's weight is its own word, so what is cut is decided by one vote per site. No site has more than
`federation.max-share` of the weight (panfm/sharing/shares.py): of the total in the geometric median, which withstands
wrong ones below half of it, and of what is left of each number in the trimmed mean. All three keep every update of a
round: memory grows with the number of sites. Flower's FedMedian and FedTrimmedAvg want the same arrays from all sites,
take no weights, and are methods rather than functions.

With few and unlike sites an honest one looks like an outlier; three sites are the least with which any of these does
anything, and with two the median is their plain mean.

Source:
    Yin et al. 2018 (arXiv 1803.01498); Pillutla et al. 2022 (arXiv 1912.13445), Algorithm 2 (smoothed Weiszfeld).
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from panfm.config.sharing import Mean
from panfm.sharing.groups import Flat, Segments
from panfm.sharing.mean import ExactMean, Votes
from panfm.sharing.shares import FEWEST, capped_weights
from panfm.sharing.weights import Weights

_CHUNK = 1 << 14
_SMOOTHING = 1e-6
_ITERATIONS = 100


class HeldMean:
    """One of these means of one group; order-independent, for updates are sorted by content before anything is done."""

    def __init__(
        self,
        segments: Segments,
        kind: Mean,
        *,
        trim: float,
        weight_limit: float,
        max_share: float = 1.0,
        space: Flat | None = None,
        votes: Votes | None = None,
    ) -> None:
        """An empty mean.

        Args:
            segments: As for `ExactMean`; each weight's numbers have a mean of their own.
            kind: median, trimmed or geometric-median.
            trim: Share of the sites that `trimmed` cuts off at each end.
            weight_limit: As for `ExactMean`.
            max_share: As for `ExactMean`.
            space: As for `ExactMean`, which looks at every contribution first.
            votes: As for `ExactMean`.
        """
        self._segments = segments
        self._kind = kind
        self._trim = trim
        self._max_share = max_share
        self._guard = ExactMean(segments, weight_limit=weight_limit, space=space, votes=votes)
        self._held: list[tuple[Weights, bytes, Flat]] = []

    def add(self, update: Flat, weights: Weights) -> float:
        """Keep one site's contribution, as `ExactMean.add` says."""
        norm = self._guard.add(update, weights)
        self._held.append((weights, hashlib.sha256(update.data).digest(), update))
        return norm

    def take_off(self, update: Flat, weights: Weights) -> None:
        """As `ExactMean.take_off`."""
        self._guard.take_off(update, weights)
        self._held = [kept for kept in self._held if kept[2] is not update]

    def mean(self) -> Flat | None:
        """As `ExactMean.mean`: None if nobody contributed any weight, -0.0 where nobody did."""
        held = sorted(self._held, key=lambda contribution: contribution[:2])
        if not any(any(weights) for weights, _, _ in held):
            return None
        parts, start = [], 0
        for length, which in self._segments:
            here = slice(start, start := start + length)
            votes = [(update[here], weights[which]) for weights, _, update in held if weights[which]]
            parts.append(self._robust(*zip(*votes, strict=True)) if votes else np.full(length, -0.0, np.float32))
        return np.concatenate(parts)

    def _robust(self, updates: Sequence[Flat], weights: Sequence[float]) -> Flat:
        match self._kind:
            case "median":
                return coordinate_median(updates)
            case "trimmed":
                return trimmed_mean(updates, weights, trim=self._trim, max_share=self._max_share)
            case "geometric-median":
                return geometric_median(updates, capped_weights(weights, self._max_share))
            case "weighted" | "l-dawa":
                raise ValueError(f"mean: {self._kind} is not a robust one")
            case _:
                assert_never(self._kind)


def coordinate_median(updates: Sequence[Flat]) -> Flat:
    """Median of each number, float32."""
    return np.concatenate([np.median(stack, axis=0) for stack in _stacks(updates)]).astype(np.float32)


def trimmed_mean(updates: Sequence[Flat], weights: Sequence[float], *, trim: float, max_share: float = 1.0) -> Flat:
    """Mean of each number without the extreme sites; at least one is left."""
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
    """The weights [sites, numbers], those of each number lowered to its water level."""
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
    """argmin_z sum_k w_k |z - u_k|, to a millionth of the spread of the updates."""
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
    """All updates, some numbers at a time: [sites, numbers]."""
    for start in range(0, max(len(updates[0]), 1), _CHUNK):
        yield np.stack([update[start : start + _CHUNK] for update in updates]).astype(np.float64)


def _combine(updates: Sequence[Flat], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([shares @ stack for stack in _stacks(updates)])


def _distances(updates: Sequence[Flat], centre: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray([np.linalg.norm(update - centre) for update in updates])
