"""A flipped sign shows against the median of all sites."""

import numpy as np
import pytest

from panfm.sharing.messages import RoundReply
from strategies.direction import cosines, pointing_elsewhere

COMMON = np.random.default_rng(0).normal(size=1000)


def reply(seed: int, *, sign: float = 1.0, groups: tuple[str, ...] = ("backbone", "head")) -> RoundReply:
    """What all agree on, and as much again of its own."""
    random = np.random.default_rng(seed)
    updates = {group: (sign * (COMMON + random.normal(size=1000))).astype(np.float32) for group in groups}
    return RoundReply("run", 1, 0, updates, dict.fromkeys(groups, (1.0,)))


@pytest.mark.parametrize("num", [4, 5, 9])
def test_the_flipped_one_is_named_and_no_other(num):
    honest = {f"site-{seed}": reply(seed) for seed in range(1, num)}
    assert pointing_elsewhere(honest | {"zeta": reply(99)}, 0.4) == {}
    assert list(pointing_elsewhere(honest | {"zeta": reply(99, sign=-1.0)}, 0.4)) == ["zeta"]


def test_by_hand():
    """The median of the other three of a is (0, 1), of b (1, 0.5), of c (0, 0.5), of d (1, 1)."""
    updates = {"a": [1.0, 0.5], "b": [0.0, 1.0], "c": [1.0, 1.0], "d": [-3.0, -4.0]}
    replies = {
        site: RoundReply("run", 1, 0, {"head": np.array(update, np.float32)}, {"head": (1.0,)})
        for site, update in updates.items()
    }
    expected = {"a": 0.5 / 1.25**0.5, "b": 0.5 / 1.25**0.5, "c": 0.5 / (2 * 0.25) ** 0.5, "d": -7 / 5 / 2**0.5}
    assert cosines(replies) == pytest.approx(expected)


def test_what_only_three_trained_is_not_judged():
    replies = {name: reply(seed) for seed, name in enumerate("abc")} | {"d": reply(9, sign=-1.0)}
    assert list(pointing_elsewhere(replies, 0.4)) == ["d"]
    replies["a"] = reply(1, groups=("backbone",))
    replies["d"] = reply(9, sign=-1.0, groups=("head",))
    assert cosines(replies) == {}


def test_an_update_of_zeros_points_nowhere():
    zeros = RoundReply("run", 1, 0, {"head": np.zeros(1000, np.float32)}, {"head": (1.0,)})
    replies = {"a": reply(1), "b": reply(2), "c": zeros, "d": reply(3)}
    assert cosines(replies)["c"] == 0
    assert "c" in pointing_elsewhere(replies, 0.4)


def test_weight_nothing_counts_nothing():
    idle = RoundReply("run", 1, 0, {"head": np.ones(1000, np.float32)}, {"head": (0.0,)})
    assert cosines({name: reply(seed, groups=("head",)) for seed, name in enumerate("abc")} | {"d": idle}) == {}


def test_sites_that_all_pull_apart_are_usual():
    """Late in training: each pulls back to its own data, and the cosines are negative. One that joins the others' sum
    is the odd one out."""
    own = np.random.default_rng(1).normal(size=(5, 1000))
    pulls = (own - own.mean(axis=0)).astype(np.float32)
    apart = {f"site-{k}": RoundReply("run", 1, 0, {"head": pull}, {"head": (1.0,)}) for k, pull in enumerate(pulls)}
    assert all(cosine < -0.1 for cosine in cosines(apart).values())
    assert pointing_elsewhere(apart, 0.3) == {}
    flipped = apart | {"site-2": RoundReply("run", 1, 0, {"head": -pulls[2]}, {"head": (1.0,)})}
    assert list(pointing_elsewhere(flipped, 0.3)) == ["site-2"]
