"""A flipped sign shows against the votes of the round before."""

import numpy as np
import pytest

from panfm.errors import ProtocolError
from strategies.exact_mean import ExactMean
from strategies.reply_guards import Directions
from strategies.server_step import Memory

COMMON = np.random.default_rng(0).normal(size=1000)


def update(seed: int, *, sign: float = 1.0) -> np.ndarray:
    """What all agree on, and as much again of a site's own."""
    return (sign * (COMMON + np.random.default_rng(seed).normal(size=1000))).astype(np.float32)


def one_round(memory: Memory, updates: dict[str, np.ndarray], *, weight: float = 1.0) -> tuple[Memory, dict[str, str]]:
    """The memory after a round, and who was refused."""
    directions, refused = Directions(0.4, memory), {}
    size = len(next(iter(updates.values())))
    mean = ExactMean(((size, 0),), weight_limit=100, votes=directions.votes("head", size, len(updates)))
    for site, flat in updates.items():
        norm = mean.add(flat, (weight,))
        cosines = {"head": directions.cosine("head", norm)} if weight else {}
        try:
            directions.check(site, cosines)
        except ProtocolError as error:
            mean.remove(flat, (weight,))
            refused[site] = str(error)
        else:
            directions.accept(site, cosines)
    after = Memory()
    directions.remember(after)
    return after, refused


def sites(num: int, first_seed: int) -> dict[str, np.ndarray]:
    return {f"site-{seed}": update(first_seed + seed) for seed in range(num)}


@pytest.mark.parametrize("num", [4, 5, 9])
def test_the_flipped_one_is_named_and_no_other(num):
    memory, refused = one_round(Memory(), sites(num, 100))
    for round_number in range(2, 5):
        flipped = sites(num, 100 * round_number) | {"site-1": update(99, sign=-1.0)}
        memory, refused = one_round(memory, flipped)
        assert list(refused) == ["site-1"]
        assert "points elsewhere: cosine -0" in refused["site-1"]


def test_by_hand():
    """Of the first numbers three are above 0 and one below, of the second three above and none below."""
    updates = {"a": [1.0, 1.0], "b": [2.0, 0.5], "c": [1.0, 0.0], "d": [-1.0, 9.0]}
    memory, _ = one_round(Memory(), {site: np.array(flat, np.float32) for site, flat in updates.items()})
    assert memory.votes["head"].tolist() == [2, 3]
    assert memory.voters == {"head": ("a", "b", "c", "d")}
    assert memory.cosines == {}
    directions = Directions(0.4, memory)
    mean = ExactMean(((2, 0),), weight_limit=9, votes=directions.votes("head", 2, 4))
    norm = mean.add(np.array([3.0, 4.0], np.float32), (1.0,))
    assert directions.cosine("head", norm) == pytest.approx(18 / 5 / 13**0.5)


def test_of_three_sites_none_is_judged():
    memory, _ = one_round(Memory(), sites(3, 100))
    _, refused = one_round(memory, sites(2, 200) | {"site-2": update(9, sign=-1.0)})
    assert refused == {}


def test_a_refused_update_has_no_vote():
    memory, _ = one_round(Memory(), sites(5, 100))
    with_flipped, _ = one_round(memory, sites(4, 200) | {"zeta": update(9, sign=-1.0)})
    without, _ = one_round(memory, sites(4, 200))
    assert with_flipped.votes["head"].tobytes() == without.votes["head"].tobytes()
    assert with_flipped.cosines == without.cosines


def test_weight_nothing_votes_nothing():
    memory, _ = one_round(Memory(), sites(4, 100), weight=0.0)
    assert memory == Memory()


def test_a_group_that_nobody_trained_keeps_its_votes():
    memory, _ = one_round(Memory(), sites(4, 100))
    after = Memory()
    Directions(0.4, memory).remember(after)
    assert after.votes["head"] is memory.votes["head"]
    assert after.voters == memory.voters


def test_sites_that_all_pull_apart_are_usual():
    """Late in training: each pulls back to its own data, and cosines are negative. One that joins the others' sum is
    the odd one out."""
    own = np.random.default_rng(1).normal(size=(5, 1000))
    votes = np.sign(own).sum(axis=0)
    pulls = {f"site-{k}": (row - 0.5 * votes).astype(np.float32) for k, row in enumerate(own)}
    memory = Memory(votes={"head": votes.astype(np.int8)}, voters={"head": tuple(pulls)})
    usual = {site: float(pull @ votes / np.linalg.norm(pull) / np.linalg.norm(votes)) for site, pull in pulls.items()}
    assert max(usual.values()) < -0.2
    memory.cosines = {"head": usual}
    assert one_round(memory, pulls)[1] == {}
    assert list(one_round(memory, pulls | {"site-2": -pulls["site-2"]})[1]) == ["site-2"]


def test_many_sites_have_room_for_their_votes():
    directions = Directions(0.4, Memory(votes={"head": np.array([3], np.int8)}))
    votes = directions.votes("head", 1, 300)
    mean = ExactMean(((1, 0),), weight_limit=300, votes=votes)
    for _ in range(300):
        mean.add(np.ones(1, np.float32), (1.0,))
    assert votes.counted.tolist() == [300]
    assert votes.product == 3


def test_to_agree_more_than_usual_is_no_fault():
    memory, _ = one_round(Memory(), sites(5, 100))
    memory.cosines = {"head": dict.fromkeys(sites(5, 100), 0.1)}
    assert one_round(memory, sites(5, 200))[1] == {}
