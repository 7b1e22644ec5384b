"""Caps on the weight of a site in the mean, whatever the site states.

    before the round    w_k <= max-weight x median over the asked sites of the most they may weigh, by their handshakes
    as replies count    w_k <= L    L: the largest level at which no site has more than `max-share` of the sum of the
                                    weights so lowered (water-filling)

Both hold for a group where three sites or more are asked, or contribute, and never give less than an equal share. Of
two sites it cannot be told which one is inflated: their weights count as stated.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from statistics import median

from panfm.errors import ProtocolError
from panfm.registry import MEANS
from panfm.sharing.groups import DIRECTOR, EXPERTS, ROUTER, GroupManifest
from panfm.sharing.messages import Handshake, RoundReply
from panfm.sharing.weights import ROUNDING, GroupWeights, Weights

FEWEST = 3
"""Contributing sites with which the caps are in force."""


class WeightLimits:
    """The most that each asked site may weigh in each group in one round."""

    def __init__(self, weights: GroupWeights, max_weight: float, asked: Collection[Handshake]) -> None:
        """Compute the limits from the handshakes of the asked sites.

        Args:
            max_weight: `federation.max-weight`.
        """
        self._by_site = {
            handshake.site: {
                group: weights.limits(group, subjects=handshake.subjects, subjects_per_stream=handshake.streams)
                for group in handshake.group_hashes
            }
            for handshake in asked
        }
        largest: dict[str, list[float]] = {}
        for limits in self._by_site.values():
            for group, own in limits.items():
                largest.setdefault(group, []).append(max(own, default=0.0))
        self._cap = {group: max_weight * median(most) for group, most in largest.items() if len(most) >= FEWEST}
        self._largest = largest

    def of_site(self, site: str) -> Mapping[str, Weights]:
        """Group -> the most that a site may state, by its own handshake."""
        return self._by_site[site]

    def cap(self, reply: RoundReply) -> RoundReply:
        """Lower the weights of a reply to what the median site allows."""
        weights = {
            group: tuple(min(weight, self._cap.get(group, weight)) for weight in weights)
            for group, weights in reply.weights.items()
        }
        return replace(reply, weights=weights)

    def total(self, group: str) -> float:
        """Largest sum of a weight of a group over all asked sites; 1 if none of them may weigh anything."""
        cap = self._cap.get(group, math.inf)
        return sum(min(limit, cap) for limit in self._largest.get(group, ())) or 1.0


def group_shares(
    group_weights: GroupWeights, max_share: float, accepted: Mapping[str, RoundReply]
) -> dict[str, dict[str, float]]:
    """Site -> group -> its share of the weight, as it counted in the mean.

    A pooled group has a weight for each expert: its share is the largest over experts that three sites or more used.

    Args:
        max_share: Largest share of a group's weight that a site may have.
        accepted: Site -> its reply, without the updates.
    """
    shares: dict[str, dict[str, float]] = {site: {} for site in sorted(accepted)}
    for group in group_weights.manifest.groups:
        stated = {site: reply.weights[group] for site, reply in sorted(accepted.items()) if group in reply.weights}
        is_by_expert = group_weights.is_pooled(group)
        for which in range(len(group_weights.manifest.experts(group)) if is_by_expert else 1):
            weights = {site: weights[which] for site, weights in stated.items()}
            if not MEANS.load(group_weights.sharing.mean_of(group)).uses_weights:
                weights = {site: float(weight > 0.0) for site, weight in weights.items()}
            if is_by_expert and sum(map(bool, weights.values())) < FEWEST:
                continue
            for site, share in capped_shares(weights, max_share).items():
                shares[site][group] = max(shares[site].get(group, 0.0), share)
    return shares


def water_level(weights: Sequence[float], max_share: float) -> Fraction | None:
    """Level to which larger weights are lowered; None if no weight is.

    Args:
        weights: One per site, >= 0; a site with 0 does not contribute.
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
    """Weights lowered to the water level."""
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


def check_gate_mass(rules: GroupWeights, weights: Mapping[str, Weights], *, subjects: int) -> None:
    """Refuse gate mass that no images have.

    A layer's experts share the images of the steps among them: their weights sum to as many in every layer and in
    each pooled group, to no more than a round's batches hold, and over the layers to the director's weight.

    Args:
        weights: Group -> weights of one site.
        subjects: Of that site, as it said before round 1.
    Raises:
        ProtocolError: the sum, and what it is expected to be.
    """
    most = rules.most_images(subjects)
    images: float | None = None
    for group in (group for group in (EXPERTS, ROUTER) if group in weights and rules.is_pooled(group)):
        for layer, mass in _layer_masses(rules.manifest, group, weights[group]).items():
            if not mass <= most:
                raise ProtocolError(f"{group}: gate mass {mass:g} in {layer}, expected at most {most:g} images")
            images = mass if images is None else images
            if not _agree(mass, images):
                other = f"expected {images:g} as in other layers"
                raise ProtocolError(f"{group}: gate mass {mass:g} in {layer}, {other}")
    if images is not None and DIRECTOR in weights:
        total, expected = sum(weights[DIRECTOR]), images * len(rules.layer_names(DIRECTOR))
        if not _agree(total, expected):
            raise ProtocolError(f"director: weight {total:g}, expected {expected:g}, its layers' gate mass")


def _layer_masses(manifest: GroupManifest, group: str, weights: Weights) -> dict[str, float]:
    """Layer -> sum of its experts' weights. Raises ProtocolError if there is not one for each expert."""
    experts = manifest.experts(group)
    if len(weights) != len(experts):
        raise ProtocolError(f"{group}: {len(weights)} weights, expected {len(experts)}")
    masses: dict[str, float] = {}
    for (layer, _), weight in zip(experts, weights, strict=True):
        masses[layer] = masses.get(layer, 0.0) + weight
    return masses


def _agree(one: float, other: float) -> bool:
    return max(one, other) <= ROUNDING * min(one, other)
