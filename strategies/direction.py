"""Whose update points another way than the sites' usually do: the guard against a flipped sign, which no norm shows.

    v    = sum_k sign(u_k)             votes: of the accepted updates of the last round that trained a group
    c_k  = cos(u_k, v)                 of this round's update of site k with them
    refused: c_k < 0 and usual c - c_k > limit   usual: median c of the other sites, in that last round; 0 without one
             |c_k - usual c| > limit             where the usual is below 0

Group by group, where three other sites or more have voted. Every site has one vote of each number, whatever it weighs
and how long its update is. Nothing has to be kept of an update, and a reply is judged as it comes.

Not c_k < 0: unlike sites agree at first, later each pulls back to its own data. On the quickstart's five sites c of the
backbone is 0.2 in round 2, near 0 in round 7 and -0.35 in round 20; a site with its sign flipped has about -c. So it
stands out early and late; in between directions say nothing. To agree more than usual is no fault where sites agree,
nor is to agree little: a site that comes back after some rounds does (c 0.07 where 0.48 was usual). Of three sites, one
wrong, nobody can tell which it is.

The guard is against a minority. Replies that it alone refuses are kept until all have come; if they are not fewer than
the accepted ones, honest sites have turned together, and all of them count.
"""

import math
from collections.abc import Mapping
from statistics import median

import numpy as np
from numpy.typing import NDArray

from panfm.errors import ProtocolError
from panfm.sharing.mean import Votes
from strategies.memory import Memory


class PointsElsewhereError(ProtocolError):
    """An update of a reply points another way than updates usually do."""


LIMIT = 0.4
"""Where `guards.direction` is left out."""
OTHERS = 3
"""Other sites whose votes are needed to judge one."""
_INT8_SITES = 127
_CHUNK = 1 << 16


class Directions:
    """The votes of one round, and how updates stand to those of the round before."""

    def __init__(self, limit: float, memory: Memory) -> None:
        """Make ready.

        Args:
            limit: Largest distance from the usual cosine.
            memory: That of the round before.
        """
        self.cosines: dict[str, dict[str, float]] = {}
        """Group -> site -> cosine of its accepted update."""
        self._limit = limit
        self._memory = memory
        self._votes: dict[str, Votes] = {}
        self._lengths = {group: _length(votes) for group, votes in memory.votes.items()}

    def start(self, group: str, size: int, num_sites: int) -> Votes:
        """Where a mean is to count the signs of a group's updates, of at most so many sites."""
        kind = np.dtype(np.int8 if num_sites <= _INT8_SITES else np.int16)
        before = self._memory.votes.get(group, np.zeros(0, kind))
        self._votes[group] = Votes(np.zeros(size, kind), before)
        return self._votes[group]

    def cosine(self, group: str, norm: float) -> float:
        """Of the update that was last added to the group's mean, of this norm; 0 without votes."""
        length = self._lengths.get(group, 0.0) * norm
        cosine = self._votes[group].product / length if 0.0 < length < math.inf else 0.0
        return min(max(cosine, -1.0), 1.0)

    def check(self, site: str, cosines: Mapping[str, float]) -> None:
        """Raises PointsElsewhereError for an update that is to be refused."""
        for group, cosine in cosines.items():
            if len(set(self._memory.voters.get(group, ())) - {site}) < OTHERS:
                continue
            others = [usual for other, usual in self._memory.cosines.get(group, {}).items() if other != site]
            usual = median(others) if others else 0.0
            too_far = abs(cosine - usual) if usual < 0.0 else usual - cosine
            if too_far > self._limit and (usual < 0.0 or cosine < 0.0):
                raise PointsElsewhereError(
                    f"{group}: points elsewhere: cosine {cosine:.2f} with the others, usual {usual:.2f} "
                    "(sharing.guards.direction)"
                )

    def accept(self, site: str, cosines: Mapping[str, float]) -> None:
        """Remember an accepted update's cosines."""
        for group, cosine in cosines.items():
            self.cosines.setdefault(group, {})[site] = cosine

    def remember(self, after: Memory) -> None:
        """Put what the next round needs into its memory; groups that nobody trained keep theirs."""
        trained = {group: sites for group, sites in self.cosines.items() if sites}
        after.votes = self._memory.votes | {group: self._votes[group].counted for group in trained}
        after.voters = self._memory.voters | {group: tuple(sorted(sites)) for group, sites in trained.items()}
        told = {group: dict(sorted(sites.items())) for group, sites in trained.items() if group in self._memory.votes}
        after.cosines = self._memory.cosines | told


def _length(votes: NDArray[np.int8] | NDArray[np.int16]) -> float:
    parts = (votes[start : start + _CHUNK].astype(np.float64) for start in range(0, len(votes), _CHUNK))
    return math.sqrt(sum(float(np.dot(part, part)) for part in parts))
