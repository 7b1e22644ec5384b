"""Whose update points another way than the sites' usually do: the guard against a flipped sign, which no norm shows.

    c_k = cosine of site k's update with the number-by-number median of the other sites', over the groups that four
          sites or more trained
    refused: |c_k - median of all c| > limit

Not c_k < 0: unlike sites agree at first, later each pulls back to its own data. On the quickstart's five sites c is
0.4 to 0.6 in round 1, near 0 in round 7 and -0.3 in round 20; a site with its sign flipped has about -c. So it stands
out early and late; in between directions say nothing, and a robust mean is all that limits the harm. Of three sites,
one wrong, nobody can tell which it is.
"""

from collections.abc import Mapping
from statistics import median

import numpy as np

from panfm.sharing.groups import Flat
from panfm.sharing.messages import RoundReply
from strategies.robust import coordinate_median

_FEWEST = 4


def pointing_elsewhere(replies: Mapping[str, RoundReply], limit: float) -> dict[str, str]:
    """Site -> reason, for those that are to be refused."""
    found = cosines(replies)
    usual = median(found.values()) if found else 0.0
    return {
        site: f"points elsewhere: cosine {cosine:.2f} with the others, usual {usual:.2f} (sharing.guards.direction)"
        for site, cosine in found.items()
        if abs(cosine - usual) > limit
    }


def cosines(replies: Mapping[str, RoundReply]) -> dict[str, float]:
    """Site -> cosine of its update with the median of the others; sites that share no group with three others are left
    out."""
    products: dict[str, list[tuple[float, float, float]]] = {}
    for group in sorted({group for reply in replies.values() for group in reply.updates}):
        trained = {site: reply for site, reply in sorted(replies.items()) if any(reply.weights.get(group, ()))}
        held = {site: reply.updates[group] for site, reply in trained.items()}
        if len(held) >= _FEWEST:
            for site in held:
                others = coordinate_median([update for other, update in held.items() if other != site])
                products.setdefault(site, []).append(_products(held[site], others))
    return {site: _cosine(*map(sum, zip(*found, strict=True))) for site, found in products.items()}


def _products(one: Flat, other: Flat) -> tuple[float, float, float]:
    return float(np.dot(one, other)), float(np.dot(one, one)), float(np.dot(other, other))


def _cosine(dot: float, one: float, other: float) -> float:
    return dot / float(np.sqrt(one * other)) if dot else 0.0
