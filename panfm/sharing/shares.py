"""Caps on the weight of a site in the mean, whatever it says of itself.

    before the round    w_k <= max-weight x median over the sites asked of the most they may weigh, by their handshakes
    as replies count    w_k <= L    L: the largest level at which no site has more than `max-share` of the sum of the
                                    weights so lowered (water-filling)

Both are in force for a group where three sites or more are asked, or contribute, and never give less than an equal
share. Of two sites neither can be told to be the inflated one: they count as they say.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

FEWEST = 3
"""Contributing sites with which the caps are in force."""


def water_level(weights: Sequence[float], max_share: float) -> Fraction | None:
    """The level to which larger weights are lowered; None if no weight is.

    Args:
        weights: One per site, >= 0; those that are 0 do not contribute.
        max_share: Largest share of the sum of the lowered weights.
    """
    largest_first: list[Fraction] = sorted((Fraction(weight) for weight in weights if weight), reverse=True)
    if len(largest_first) < FEWEST:
        return None
    share = max(Fraction(max_share), Fraction(1, len(largest_first)))
    rest = sum(largest_first)
    for num_lowered, weight in enumerate(largest_first):
        level = share * rest / (1 - num_lowered * share)
        if weight <= level:
            return level if num_lowered else None
        rest -= weight
    raise AssertionError("the smallest weight never exceeds an equal share")


def capped_weights(weights: Sequence[float], max_share: float) -> list[float]:
    """The weights, lowered to the water level."""
    level = water_level(weights, max_share)
    return [float(weight if level is None else min(Fraction(weight), level)) for weight in weights]


def capped_shares(weights: Mapping[str, float], max_share: float) -> dict[str, float]:
    """Site -> its share of the sum of the capped weights; 0 for all if nobody contributes."""
    lowered = dict(zip(weights, capped_weights(list(weights.values()), max_share), strict=True))
    total = sum(lowered.values())
    return {site: weight / total if total else 0.0 for site, weight in lowered.items()}


def may_be_capped(weight: int, weights: Sequence[int], max_share: float) -> bool:
    """Whether a weight among these would be lowered, or might be once more sites contribute.

    A weight w is lowered if it exceeds `max_share` of sum_j min(w_j, w), which only grows as sites contribute.
    """
    return weight > Fraction(max_share) * sum(min(weight, other) for other in weights)
