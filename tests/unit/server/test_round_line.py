from itertools import permutations

import pytest

from panfm.sharing.messages import RoundReply
from server.round_line import federated_profile


def reply(saliency: dict[str, float], **subjects: float) -> RoundReply:
    weights = {f"stream:{stream}-mr": (weight,) for stream, weight in subjects.items()}
    return RoundReply("r", 1, 0, {}, weights, saliency={f"{stream}-mr": value for stream, value in saliency.items()})


def test_by_hand():
    profile = federated_profile(
        [reply({"brain": 0.5, "heart": 1.5}, brain=10, heart=30), reply({"brain": 1.1, "liver": 0.9}, brain=5, liver=2)]
    )
    assert profile == pytest.approx({"brain-mr": (5 + 5.5) / 15, "heart-mr": 1.5, "liver-mr": 0.9})


def test_sites_with_one_stream_say_nothing():
    both = reply({"brain": 0.5, "heart": 1.5}, brain=10, heart=30)
    assert federated_profile([both, reply({"brain": 1.0}, brain=1000)]) == federated_profile([both])
    assert federated_profile([reply({"brain": 1.0}, brain=5)]) is None
    assert federated_profile([]) is None


def test_order_does_not_matter():
    replies = [reply({"brain": 0.1 * k, "heart": 1.7}, brain=3.3 * k, heart=0.1) for k in range(1, 5)]
    assert len({str(federated_profile(order)) for order in permutations(replies)}) == 1
