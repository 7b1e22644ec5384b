"""A hostile site cannot raise its own norm limit by growing slowly."""

import numpy as np
import pytest

from panfm.sharing.messages import RoundReply
from strategies.reply_guards import NormBounds
from strategies.server_step import Memory
from tests.attacks.test_site_share import MANIFEST, asked, handshake, message

_ROUNDS = 12


@pytest.mark.slow
@pytest.mark.parametrize("num_honest", [1, 2, 4])
def test_a_site_that_grows_by_the_ratio_each_round_stays_under_a_fixed_multiple_of_the_honest_ones(
    make_run, num_honest
):
    """Each round it tries ever smaller multiples of what passed last, until one does. Honest norms stay the same."""
    roster = {node: handshake(f"site-{node}", 100) for node in range(1, num_honest + 2)}
    hostile = num_honest + 1
    memory, length, accepted = Memory(), 1e-6, []
    for number in range(1, _ROUNDS):
        for growth in (30.0, 10.0, 3.0, 2.0, 1.0, 0.3):
            strategy = asked(
                make_run("[sharing.guards]\nnorm-limit = 1e5\ndirection = 2.0\n"), roster, MANIFEST, number, memory
            )
            replies = [_reply(number, node, 1e-6 if node != hostile else length * growth) for node in roster]
            strategy.aggregate_train(number, iter(replies))
            if f"site-{hostile}" in strategy.outcome.accepted:
                break
        memory, length = strategy.memory, length * growth
        accepted.append(length)
    ratio = 30.0 if num_honest == 1 else 3.0
    assert max(accepted[3:]) <= ratio * 1e-6 * (1 + 1e-6)


def _reply(number: int, node: int, value: float):
    updates = {group: np.full(MANIFEST.size(group), value, np.float32) for group in MANIFEST.groups}
    weights = {"backbone": (200.0,), "stream:brain-mr": (100.0,)}
    return message(node, RoundReply("run", number, 0, updates, weights))


def test_an_update_as_long_as_passes_moves_a_group_by_its_share_of_what_is_usual(make_run):
    """Four honest sites move by a millionth each round; the fifth by 2.9 millionths the other way."""
    roster = {node: handshake(f"site-{node}", 100) for node in range(1, 6)}
    memory = Memory()
    for number in range(1, 4):
        strategy = asked(make_run("[sharing.guards]\ndirection = 2.0\n"), roster, MANIFEST, number, memory)
        replies = [_reply(number, node, 1e-6 if node < 5 else -2.9e-6) for node in roster]
        arrays, _ = strategy.aggregate_train(number, iter(replies))
        before, memory = memory, strategy.memory
    assert strategy.outcome.rejected == {}
    bounds = NormBounds(strategy.run.sharing, strategy.run.train, number, before.norms)
    usual = bounds.clip("site-5", "backbone") / MANIFEST.size("backbone") ** 0.5
    assert 0.9e-6 < usual < 1e-6  # learning rates fall, and the honest ones are shortened too
    np.testing.assert_allclose(arrays["backbone"].numpy(), (4 - 1) / 5 * usual, rtol=2e-3)
