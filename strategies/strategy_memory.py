"""State that a strategy carries from round to round. The server's checkpoint holds it, so that resuming is exact."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from panfm.sharing.groups import Flat

Norms = Mapping[str, Mapping[str, tuple[tuple[int, float], ...]]]
"""Group -> site -> (round, norm of its accepted update) of the last rounds, oldest first."""
HISTORY_ROUNDS = 10
"""Rounds whose norms are kept, for each group those in which anybody trained it."""


@dataclass
class Memory:
    """Everything that a strategy needs from earlier rounds, except the model."""

    norms: Norms = field(default_factory=dict)
    slots: dict[str, Mapping[str, Flat]] = field(default_factory=dict)
    """Group -> slot of its server optimiser -> float32 array, e.g. `momentum`."""
    step: dict[str, NDArray[Any]] = field(default_factory=dict)
    """The last step of the global parameters, coded; empty where updates travel as float32."""
    lost: dict[str, Flat] = field(default_factory=dict)
    """Group -> what the coding of its last step rounded away."""
    holders: tuple[str, ...] = ()
    """Sites that have the parameters from which the last step starts."""
    average: dict[str, Flat] = field(default_factory=dict)
    """Group -> EMA of its global parameters; empty unless teachers start there."""
    votes: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Group -> sum of the signs of the accepted updates of the round in which it was last trained (reply_guards.py)."""
    cosines: dict[str, dict[str, float]] = field(default_factory=dict)
    """Group -> site -> cosine of its accepted update, in that round, with the votes before."""
    voters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Group -> sites whose updates gave these votes."""


def add_norms(past: Norms, round_number: int, accepted: Mapping[str, Mapping[str, float]]) -> Norms:
    """Add the norms of a round's accepted replies to those of earlier rounds; untrained groups keep theirs."""
    after = {group: dict(sites) for group, sites in past.items()}
    for site, norms in accepted.items():
        for group, norm in norms.items():
            sites = after.setdefault(group, {})
            sites[site] = (*sites.get(site, ()), (round_number, norm))
    return {group: _latest(sites) for group, sites in sorted(after.items())}


def _latest(sites: Mapping[str, tuple[tuple[int, float], ...]]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Keep the entries of the last rounds in which anybody trained the group."""
    numbers = sorted({number for entries in sites.values() for number, _ in entries})[-HISTORY_ROUNDS:]
    kept = {
        site: tuple(entry for entry in entries if entry[0] >= numbers[0]) for site, entries in sorted(sites.items())
    }
    return {site: entries for site, entries in kept.items() if entries}
