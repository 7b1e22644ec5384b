"""Guards: checks that refuse a site's reply, or shorten its update.

    content      run, round, groups, weights and saliency are those that the site may state          `check_reply`
    norms        a reply scaled a thousandfold is refused before it touches the mean                 `NormBounds`
    direction    an update whose sign was flipped, which no norm shows                               `Directions`

Norms, for each group:

    absolute    |update| <= norm-limit x (sum of the round's learning rates) x sqrt(numbers)
    relative    |update| <= norm-ratio x median over the last ten rounds of the round's median norm of the *other* sites
    shortened   to norm-ratio / 3 x the same median over the last three rounds, if it is longer

AdamW moves a number by about its learning rate in a step, or less, whatever the gradient: the absolute bound is what
local training can reach. Directors follow, with a lag, experts that moved in earlier rounds: their bound is that of a
round at the full learning rate. A site's own norms never move its bound, so that it cannot climb round by round, and
sites that left a group as it was do not count. The relative bound holds once two other sites or more have trained the
group in two rounds; with less history it is ten times as wide, and without any only the absolute bound is left. Norms
of earlier rounds are scaled to this round's learning rates, for the relative bound only up: low rates at the end refuse
nobody. Together with the caps on weights (weight_caps.py) shortening bounds how far a site can move a group: by its
share times one usual norm.

Direction, for each group in which three other sites or more have voted:

    v    = sum_k sign(u_k)             votes: of the accepted updates of the last round that trained a group
    c_k  = cos(u_k, v)                 of this round's update of site k with them
    refused: c_k < 0 and usual c - c_k > limit   usual: median c of the other sites, in that last round; 0 without one
             |c_k - usual c| > limit             where the usual is below 0

Every site has one vote on each number, whatever its weight and the length of its update. No update has to be kept, and
a reply is judged as it arrives.

Why not simply c_k < 0: unlike sites agree at first, later each pulls back to its own data. On five phantom
sites c of the backbone is 0.2 in round 2, near 0 in round 7 and -0.35 in round 20; a site with its sign flipped has
about -c. So it stands out early and late; in between directions say nothing. To agree more than usual is no fault where
sites agree, nor is to agree little: a site that comes back after some rounds does (c 0.07 where 0.48 was usual). Of
three sites, one wrong, nobody can tell which it is.

The direction guard is against a minority. Replies that it alone refuses wait until all have come; if they are not fewer
than the accepted ones, honest sites have turned together, and all of them count.
"""

import math
from collections.abc import Mapping
from statistics import median

import numpy as np
from numpy.typing import NDArray

from panfm.config.sharing import SharingConfig
from panfm.config.training import TrainConfig
from panfm.errors import ProtocolError
from panfm.sharing.groups import DIRECTOR
from panfm.sharing.messages import Handshake, RoundReply
from panfm.sharing.weights import Weights
from panfm.training.monitors import NAMES as MONITORS
from panfm.training.schedules import progress_of, warmup_cosine
from strategies.exact_mean import Votes
from strategies.server_step import HISTORY_ROUNDS, Memory, Norms

CLIP = 1 / 3
"""An update longer than this times `norm-ratio` is shortened to it."""
LIMIT = 0.4
"""Where `guards.direction` is left out."""
OTHERS = 3
"""Other sites whose votes are needed to judge the direction of one."""
_CLIP_ROUNDS = 3
_SETTLED_ROUNDS, _SETTLED_SITES = 2, 2
_WIDER = 10.0
"""How much wider the relative bound is while there is less history than that."""
_INT8_SITES = 127
_CHUNK = 1 << 16
_MOST_MONITOR = 1e6
"""No model has so many features or experts."""


class PointsElsewhereError(ProtocolError):
    """An update of a reply points another way than updates usually do."""


def check_reply(
    reply: RoundReply,
    handshake: Handshake,
    limits: Mapping[str, Weights],
    *,
    of: tuple[str, int],
) -> None:
    """Refuse a reply that is stale or incomplete, or states a weight, saliency or monitor that cannot be.

    Args:
        limits: Group -> the most the site may weigh in it.
        of: Run id and round that are being answered.
    Raises:
        ProtocolError: the reason, on one line.
    """
    if (reply.run_id, reply.round_number) != of:
        raise ProtocolError(f"answers round {reply.round_number} of {reply.run_id}, expected round {of[1]} of {of[0]}")
    expected = set(handshake.group_hashes)
    for part, groups in (("updates", set(reply.updates)), ("weights", set(reply.weights))):
        if groups != expected:
            missing, extra = sorted(expected - groups), sorted(groups - expected)
            raise ProtocolError(f"{part}: missing {missing or 'none'}, not expected {extra or 'none'}")
    if not any(map(any, reply.weights.values())):
        raise ProtocolError("all local steps were skipped: in none were loss and gradient finite")
    _check_saliency(reply, handshake)
    _check_monitors(reply)
    for group, weights in reply.weights.items():
        for weight, limit in zip(weights, limits[group], strict=False):
            if not 0.0 <= weight <= limit:
                raise ProtocolError(f"{group}: weight {weight:g}, expected 0 to {limit:g} by the site's handshake")


def _check_saliency(reply: RoundReply, handshake: Handshake) -> None:
    """Refuse saliency above twice the number of streams, its maximum; twice leaves room for the noise of privacy."""
    limit = 2.0 * max(len(handshake.streams), 1)
    for stream, saliency in reply.saliency.items():
        if stream not in handshake.streams or not 0.0 <= saliency <= limit:
            raise ProtocolError(f"saliency of {stream:.40}: {saliency:g}, expected 0 to {limit:g} of a stream it holds")


def _check_monitors(reply: RoundReply) -> None:
    for name, value in reply.monitors.items():
        if name not in MONITORS or not 0.0 <= value <= _MOST_MONITOR:
            raise ProtocolError(
                f"monitor {name:.40}: {value:g}, expected 0 to {_MOST_MONITOR:g} of {', '.join(MONITORS)}"
            )


class NormBounds:
    """The bounds of one round, given the rounds before."""

    def __init__(self, sharing: SharingConfig, train: TrainConfig, round_number: int, past: Norms) -> None:
        """Prepare the bounds of a round.

        Args:
            past: Norms of the rounds before.
        """
        self._sharing = sharing
        self._train = train
        self._rates = learning_rates(train, round_number)
        self._rounds = {group: self._past_rounds(sites) for group, sites in past.items()}

    def check(self, site: str, reply: RoundReply, norms: Mapping[str, float]) -> dict[str, float]:
        """Return the norms of the groups that a site trained. Raises ProtocolError if an update is too long."""
        trained = {group: norm for group, norm in norms.items() if any(reply.weights[group])}
        for group, norm in trained.items():
            self.check_norm(site, group, norm, len(reply.updates[group]))
        return trained

    def check_norm(self, site: str, group: str, norm: float, size: int) -> None:
        """Refuse a group's update that is too long. Raises ProtocolError: the norm, and what it is at most."""
        limit, key = self.limit(site, group, size)
        if not norm <= limit:
            raise ProtocolError(f"{group}: norm {norm:.3g}, expected at most {limit:.3g} (sharing.guards.{key})")

    def limit(self, site: str, group: str, size: int) -> tuple[float, str]:
        """Return the longest that a site's update of `size` numbers may be, and the key that limits it."""
        rates = self._train.learning_rate * self._train.local_steps if group == DIRECTOR else self._rates
        absolute = self._sharing.norm_limit_of(group) * rates * math.sqrt(size)
        rounds = [
            [norm * max(self._growth(group, rate), 1.0) for norm in others]
            for rate, norms in self._rounds.get(group, ())
            if (others := _of_others(norms, site))
        ]
        settled = [others for others in rounds if len(others) >= _SETTLED_SITES]
        ratio = self._sharing.guards.norm_ratio
        if len(settled) < _SETTLED_ROUNDS:
            settled, ratio = rounds, ratio * _WIDER
        usual = median(map(median, settled)) if settled else 0.0
        return min([(absolute, "norm-limit"), *([(ratio * usual, "norm-ratio")] if usual else [])])

    def clip(self, site: str, group: str) -> float:
        """Norm to which a longer update of a site is shortened; infinite without a round of two other sites."""
        rounds = [
            [norm * self._growth(group, rate) for norm in others]
            for rate, norms in self._rounds.get(group, ())
            if len(others := _of_others(norms, site)) >= _SETTLED_SITES
        ]
        if not rounds:
            return math.inf
        return CLIP * self._sharing.guards.norm_ratio * median(map(median, rounds[-_CLIP_ROUNDS:]))

    def _growth(self, group: str, rate: float) -> float:
        """Ratio of this round's learning rates to earlier ones; 1 for directors, which follow the experts."""
        return 1.0 if group == DIRECTOR else self._rates / rate

    def _past_rounds(self, sites: Mapping[str, tuple[tuple[int, float], ...]]) -> list[tuple[float, dict[str, float]]]:
        """For each of the last rounds: sum of its learning rates, and site -> norm."""
        rounds: dict[int, dict[str, float]] = {}
        for site, entries in sites.items():
            for number, norm in entries:
                rounds.setdefault(number, {})[site] = norm
        return [(learning_rates(self._train, number), rounds[number]) for number in sorted(rounds)[-HISTORY_ROUNDS:]]


def learning_rates(train: TrainConfig, round_number: int) -> float:
    """Sum of the learning rates of a round's local steps."""
    first = (round_number - 1) * train.local_steps
    positions = (progress_of(train, first + step) for step in range(train.local_steps))
    return train.learning_rate * sum(warmup_cosine(position, warmup=train.warmup) for position in positions)


def _of_others(norms: Mapping[str, float], site: str) -> list[float]:
    """Norms of the other sites that changed the group: by the plain mean a site sends those it lacks as they came."""
    return [norm for other, norm in norms.items() if other != site and norm > 0.0]


class Directions:
    """Votes of one round, and cosines of its updates with the votes of the round before."""

    def __init__(self, limit: float, memory: Memory) -> None:
        """Prepare a round.

        Args:
            limit: Largest distance from the usual cosine.
            memory: Memory of the round before.
        """
        self.cosines: dict[str, dict[str, float]] = {}
        """Group -> site -> cosine of its accepted update."""
        self._limit = limit
        self._memory = memory
        self._votes: dict[str, Votes] = {}
        self._lengths = {group: _length(votes) for group, votes in memory.votes.items()}

    def votes(self, group: str, size: int, num_sites: int) -> Votes:
        """Return an empty count of the signs of a group's updates, of at most `num_sites` sites."""
        kind = np.dtype(np.int8 if num_sites <= _INT8_SITES else np.int16)
        before = self._memory.votes.get(group, np.zeros(0, kind))
        self._votes[group] = Votes(np.zeros(size, kind), before)
        return self._votes[group]

    def cosine(self, group: str, norm: float) -> float:
        """Cosine of the update last added to the group's mean, which has this norm; 0 without votes."""
        length = self._lengths.get(group, 0.0) * norm
        cosine = self._votes[group].product / length if 0.0 < length < math.inf else 0.0
        return min(max(cosine, -1.0), 1.0)

    def check(self, site: str, cosines: Mapping[str, float]) -> None:
        """Raise PointsElsewhereError if the update of a group points elsewhere."""
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
        """Record the cosines of an accepted reply."""
        for group, cosine in cosines.items():
            self.cosines.setdefault(group, {})[site] = cosine

    def remember(self, after: Memory) -> None:
        """Write votes and cosines into the memory for the next round; groups that nobody trained keep theirs."""
        trained = {group: sites for group, sites in self.cosines.items() if sites}
        after.votes = self._memory.votes | {group: self._votes[group].counted for group in trained}
        after.voters = self._memory.voters | {group: tuple(sorted(sites)) for group, sites in trained.items()}
        judged = {group: dict(sorted(sites.items())) for group, sites in trained.items() if group in self._memory.votes}
        after.cosines = self._memory.cosines | judged


def _length(votes: NDArray[np.int8] | NDArray[np.int16]) -> float:
    parts = (votes[start : start + _CHUNK].astype(np.float64) for start in range(0, len(votes), _CHUNK))
    return math.sqrt(sum(float(np.dot(part, part)) for part in parts))
