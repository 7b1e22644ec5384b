"""Norm bounds per group: a reply scaled a thousandfold is refused before it touches the mean.

    absolute    |update| <= norm-limit x (sum of the round's learning rates) x sqrt(numbers)
    relative    |update| <= norm-ratio x median over the last ten rounds of the round's median norm of the *other* sites
    shortened   to norm-ratio / 3 x the same median over the last three rounds, if it is longer

AdamW moves a number by about its learning rate in a step, or less, whatever the gradient: the absolute bound is what
local training can reach. A site's own norms never move its bound, so that it cannot climb round by round. The relative
bound holds from two rounds on in which two other sites or more trained the group; with less history it is ten times as
wide, and with none only the absolute bound is left. Norms of earlier rounds are scaled to this round's rates, for
the relative bound only up: an end at small rates refuses nobody.

Together with the caps on weights (panfm/sharing/shares.py) shortening bounds how far a site can move a group: by its
share times one usual norm.

A norm says nothing of direction: a sign-flipped update passes (see direction.py).
"""

import math
from collections.abc import Mapping
from statistics import median

from panfm.config import RunConfig
from panfm.config.training import TrainConfig
from panfm.errors import ProtocolError
from panfm.sharing.groups import DIRECTOR
from panfm.sharing.messages import RoundReply
from panfm.training.schedules import warmup_cosine
from strategies.memory import Norms

CLIP = 1 / 3
"""An update longer than this times `norm-ratio` is shortened to it."""
_CLIP_ROUNDS = 3
_ROUNDS = 10
_SETTLED_ROUNDS, _SETTLED_SITES = 2, 2
_WIDER = 10.0
"""How much wider the relative bound is while there is less history than that."""


class NormBounds:
    """The bounds of one round, given the rounds before."""

    def __init__(self, run: RunConfig, round_number: int, past: Norms) -> None:
        """Make ready.

        Args:
            past: Norms of the rounds before.
        """
        self._run = run
        self._rates = learning_rates(run.train, round_number)
        self._rounds = {group: self._past_rounds(sites) for group, sites in past.items()}

    def check(self, site: str, reply: RoundReply, norms: Mapping[str, float]) -> dict[str, float]:
        """Norms of the updates of those groups that a site trained. Raises ProtocolError if one is too long."""
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
        """The longest that a site's update of `size` numbers may be, and the key that says so."""
        absolute = self._run.sharing.norm_limit_of(group) * self._rates * math.sqrt(size)
        rounds = [
            [norm * max(self._growth(group, rate), 1.0) for norm in others]
            for rate, norms in self._rounds.get(group, ())
            if (others := _of_others(norms, site))
        ]
        settled = [others for others in rounds if len(others) >= _SETTLED_SITES]
        ratio = self._run.sharing.guards.norm_ratio
        if len(settled) < _SETTLED_ROUNDS:
            settled, ratio = rounds, ratio * _WIDER
        usual = median(map(median, settled)) if settled else 0.0
        return min([(absolute, "norm-limit"), *([(ratio * usual, "norm-ratio")] if usual else [])])

    def clip(self, site: str, group: str) -> float:
        """The norm to which a site's longer update is shortened; infinite without a round of two other sites."""
        rounds = [
            [norm * self._growth(group, rate) for norm in others]
            for rate, norms in self._rounds.get(group, ())
            if len(others := _of_others(norms, site)) >= _SETTLED_SITES
        ]
        if not rounds:
            return math.inf
        return CLIP * self._run.sharing.guards.norm_ratio * median(map(median, rounds[-_CLIP_ROUNDS:]))

    def _growth(self, group: str, rate: float) -> float:
        """This round's learning rates over earlier ones; directors follow the experts and know no rate."""
        return 1.0 if group == DIRECTOR else self._rates / rate

    def _past_rounds(self, sites: Mapping[str, tuple[tuple[int, float], ...]]) -> list[tuple[float, dict[str, float]]]:
        """Of each of the last rounds: sum of its learning rates, and site -> norm."""
        rounds: dict[int, dict[str, float]] = {}
        for site, entries in sites.items():
            for number, norm in entries:
                rounds.setdefault(number, {})[site] = norm
        return [(learning_rates(self._run.train, number), rounds[number]) for number in sorted(rounds)[-_ROUNDS:]]


def remember(past: Norms, round_number: int, accepted: Mapping[str, Mapping[str, float]]) -> Norms:
    """The norms after a round, given those of each accepted reply; groups that nobody trained keep theirs."""
    after = {group: dict(sites) for group, sites in past.items()}
    for site, norms in accepted.items():
        for group, norm in norms.items():
            sites = after.setdefault(group, {})
            sites[site] = (*sites.get(site, ()), (round_number, norm))
    return {group: _latest(sites) for group, sites in sorted(after.items())}


def learning_rates(train: TrainConfig, round_number: int) -> float:
    """Sum of the learning rates of a round's local steps."""
    first = (round_number - 1) * train.local_steps
    positions = ((first + step + 0.5) / train.total_steps for step in range(train.local_steps))
    return train.learning_rate * sum(warmup_cosine(position, warmup=train.warmup) for position in positions)


def _of_others(norms: Mapping[str, float], site: str) -> list[float]:
    return [norm for other, norm in norms.items() if other != site]


def _latest(sites: Mapping[str, tuple[tuple[int, float], ...]]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Entries of the last rounds in which anybody trained the group."""
    numbers = sorted({number for entries in sites.values() for number, _ in entries})[-_ROUNDS:]
    kept = {
        site: tuple(entry for entry in entries if entry[0] >= numbers[0]) for site, entries in sorted(sites.items())
    }
    return {site: entries for site, entries in kept.items() if entries}
