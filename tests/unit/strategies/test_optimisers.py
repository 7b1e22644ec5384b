"""Server optimisers against the same recursions in float64, one number at a time."""

import numpy as np
import pytest

from panfm.config.sharing import AdaptiveConfig, MomentumConfig, PlainStepConfig
from strategies.server_step import server_step

MEANS = np.array([[0.1, -0.2, 0.0], [0.1, 0.3, 0.0], [-0.4, 1e-4, 0.0]], np.float32)


def steps(config) -> np.ndarray:
    slots, found = {}, []
    for mean in MEANS:
        step, slots = server_step(config, mean, slots)
        found.append(step)
    assert all(array.dtype == np.float32 for array in (*found, *slots.values()))
    return np.stack(found)


def test_none_goes_where_the_mean_points():
    step, slots = server_step(PlainStepConfig(), MEANS[0], {})
    assert step.tobytes() == MEANS[0].tobytes()
    assert slots == {}


def test_momentum_by_hand():
    config = MomentumConfig(kind="momentum", learning_rate=0.5, momentum=0.5, nesterov=False)
    np.testing.assert_allclose(steps(config)[:, 0], [0.05, 0.075, -0.1625], rtol=1e-6)


def test_nesterov_by_hand():
    """v = 0.1, 0.15, -0.325; step = lr (d + beta v)."""
    config = MomentumConfig(kind="momentum", learning_rate=0.5, momentum=0.5)
    np.testing.assert_allclose(steps(config)[:, 0], [0.075, 0.0875, -0.28125], rtol=1e-6)


def test_a_running_mean_of_models():
    """GEMA over the federation: D <- m D + (1 - m) site, with site = D + d."""
    config = MomentumConfig(kind="momentum", learning_rate=0.01, momentum=0.0)
    np.testing.assert_allclose(steps(config), 0.01 * MEANS, rtol=1e-6)


@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_adaptive_by_the_paper(kind):
    config = AdaptiveConfig(kind=kind, learning_rate=0.02, betas=(0.8, 0.9), epsilon=1e-2)
    first, second, expected = 0.0, 1e-4, []
    for d in MEANS[:, 1].astype(float):
        first = 0.8 * first + 0.2 * d
        if kind == "adam":
            second = 0.9 * second + 0.1 * d * d
        else:
            second -= 0.1 * d * d * np.sign(second - d * d)
        expected.append(0.02 * first / (np.sqrt(second) + 1e-2))
    np.testing.assert_allclose(steps(config)[:, 1], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adam", "yogi", "momentum"])
def test_what_does_not_move_stays(kind):
    config = MomentumConfig(kind=kind) if kind == "momentum" else AdaptiveConfig(kind=kind)
    assert not steps(config)[:, 2].any()


def test_inputs_are_left_alone():
    """The mean and the slots of the round before are still needed if the round is repeated."""
    config = AdaptiveConfig(kind="yogi")
    mean = MEANS[0].copy()
    _, slots = server_step(config, mean, {})
    kept = {slot: array.copy() for slot, array in slots.items()}
    first, second = server_step(config, mean, slots), server_step(config, mean, slots)
    assert first[0].tobytes() == second[0].tobytes()
    assert all(slots[slot].tobytes() == kept[slot].tobytes() for slot in slots)
    assert mean.tobytes() == MEANS[0].tobytes()


@pytest.mark.parametrize("kind", ["adam", "yogi", "momentum"])
def test_experts_that_nobody_trained_stay_with_their_slots(kind):
    """ExactMean marks them with -0.0."""
    config = MomentumConfig(kind=kind) if kind == "momentum" else AdaptiveConfig(kind=kind)
    _, before = server_step(config, MEANS[0], {})
    step, after = server_step(config, np.array([-0.0, 0.3, 0.0], np.float32), before)
    assert np.signbit(step[0])
    assert step[0] == 0
    assert all(after[slot][0] == before[slot][0] for slot in after)
    assert after[slot := next(iter(after))][1] != before[slot][1]
