"""Norm bounds per group: a reply scaled a thousandfold is refused before it touches the mean.

    absolute    |update| <= norm-limit x learning-rate x local-steps x sqrt(numbers)     what local training can reach
    relative    |update| <= norm-ratio x median over the last rounds of the round's median norm of accepted updates

A norm says nothing of direction: a sign-flipped update passes (see direction.py).
"""

import math
from collections.abc import Iterable, Mapping
from statistics import median

from panfm.config import RunConfig
from panfm.errors import ProtocolError
from panfm.sharing.messages import RoundReply
from strategies.memory import Norms

_ROUNDS = 10


def check_norms(run: RunConfig, reply: RoundReply, norms: Mapping[str, float], past: Norms) -> dict[str, float]:
    """Norms of the updates of those groups that a site trained. Raises ProtocolError if one is too long."""
    trained = {group: found for group, found in norms.items() if any(reply.weights[group])}
    for group, found in trained.items():
        check_norm(run, group, found, len(reply.updates[group]), past)
    return trained


def check_norm(run: RunConfig, group: str, found: float, size: int, past: Norms) -> None:
    """Refuse an update that is too long.

    Args:
        found: Norm of the group's update.
        size: Numbers in it.
        past: Norms of the rounds before.
    Raises:
        ProtocolError: the norm, and what it is at most.
    """
    scale = run.train.learning_rate * run.train.local_steps * math.sqrt(size)
    limits = [("norm-limit", run.sharing.norm_limit_of(group) * scale)]
    if usual := median(past.get(group, (0.0,))):
        limits.append(("norm-ratio", run.sharing.guards.norm_ratio * usual))
    for key, limit in limits:
        if not found <= limit:
            raise ProtocolError(f"{group}: norm {found:.3g}, expected at most {limit:.3g} (sharing.guards.{key})")


def remember(past: Norms, accepted: Iterable[Mapping[str, float]]) -> Norms:
    """The norms after a round, given those of each accepted reply; groups that nobody trained keep theirs."""
    found: dict[str, list[float]] = {}
    for norms in accepted:
        for group, value in norms.items():
            found.setdefault(group, []).append(value)
    return {**past, **{group: (*past.get(group, ()), median(found[group]))[-_ROUNDS:] for group in sorted(found)}}
