"""Server optimisers: the step that the server makes of a group's mean update d; and the EMA of global parameters.

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

import numpy as np

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
