"""The server's step from a group's mean update d, and the memory that a strategy keeps from round to round.

    none        step = d
    momentum    v <- beta v + d;                            step = lr v,  with Nesterov lr (d + beta v)
    adam        m <- b1 m + (1 - b1) d;  v <- b2 v + (1 - b2) d^2;                        step = lr m / (sqrt(v) + tau)
    yogi        m as adam;               v <- v - (1 - b2) d^2 sign(v - d^2);             step = lr m / (sqrt(v) + tau)
    EMA         e <- e + (1 - momentum) (g - e), g: global parameters; sites whose teacher starts a round there get e

m and the momentum start at 0, adam's v at tau^2. Flower's FedAvgM, FedAdam and FedYogi keep their state inside an
object that cannot be saved, treat all parameters alike, and FedAdam answers in float64; so these few lines are ours.
State slots of a group or expert that nobody trained in a round stay as they are.

Source:
    Hsu et al. 2019 (arXiv 1909.06335); Reddi et al. 2021 (arXiv 2003.00295), Algorithm 2; Douillard et al. 2023 (arXiv
    2311.08105).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.config.sharing import AdaptiveConfig, MomentumConfig, PlainStepConfig
from panfm.sharing.groups import Flat

Slots = Mapping[str, Flat]


def server_step(
    config: PlainStepConfig | MomentumConfig | AdaptiveConfig, mean: Flat, slots: Slots
) -> tuple[Flat, Slots]:
    """Return the step of one group, and its state slots afterwards.

    Args:
        mean: Mean update of the round, float32.
        slots: Those returned in the round before; empty before the first.
    """
    if isinstance(config, PlainStepConfig):
        return mean, {}
    before = slots or _start(config, mean)
    if isinstance(config, MomentumConfig):
        step, after = _momentum(config, mean, before)
    else:
        step, after = _adaptive(config, mean, before)
    idle = (mean == 0) & np.signbit(mean)  # experts that nobody trained: ExactMean says -0.0
    step[idle] = -0.0
    for slot, array in after.items():
        array[idle] = before[slot][idle]
    return step, after


def _start(config: MomentumConfig | AdaptiveConfig, mean: Flat) -> Slots:
    if isinstance(config, MomentumConfig):
        return {"momentum": np.zeros_like(mean)}
    return {"first": np.zeros_like(mean), "second": np.full_like(mean, config.epsilon**2)}


def _momentum(config: MomentumConfig, mean: Flat, before: Slots) -> tuple[Flat, Slots]:
    beta, rate = np.float32(config.momentum), np.float32(config.learning_rate)
    velocity = beta * before["momentum"] + mean
    return rate * (mean + beta * velocity if config.nesterov else velocity), {"momentum": velocity}


def _adaptive(config: AdaptiveConfig, mean: Flat, before: Slots) -> tuple[Flat, Slots]:
    b1, b2 = map(np.float32, config.betas)
    rate, tau = np.float32(config.learning_rate), np.float32(config.epsilon)
    square: Flat = np.square(mean)
    excess = before["second"] - square
    pull = excess if config.kind == "adam" else square * np.sign(excess)
    first = b1 * before["first"] + (1 - b1) * mean
    second = before["second"] - (1 - b2) * pull
    root: Flat = np.sqrt(second)
    return rate * first / (root + tau), {"first": first, "second": second}


def follow_average(average: Mapping[str, Flat], groups: Mapping[str, Flat], momentum: float) -> dict[str, Flat]:
    """EMA of the global parameters after a round; a number equal to its average leaves that as it is, to the bit."""
    share = np.float32(1.0 - momentum)
    return {group: average[group] + share * (flat - average[group]) for group, flat in groups.items()}


Norms = Mapping[str, Mapping[str, tuple[tuple[int, float], ...]]]
"""Group -> site -> (round, norm of its accepted update) of the last rounds, oldest first."""
HISTORY_ROUNDS = 10
"""Rounds whose norms are kept, for each group those in which anybody trained it."""


@dataclass
class Memory:
    """Values that a strategy needs from earlier rounds, besides the model."""

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
    frozen_holders: tuple[str, ...] = ()
    """Sites that have the parameters that the run does not train; empty where it trains all."""


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
