from collections import Counter
from types import SimpleNamespace

import pytest

from strategies.round_messages import draw_sites


def roster(num: int) -> dict[int, SimpleNamespace]:
    return {100 + index: SimpleNamespace(site=f"site-{index:02d}") for index in range(num)}


def names(run, of, round_number: int) -> list[str]:
    return [handshake.site for handshake in draw_sites(run.federation, run.seed, of, round_number).values()]


def test_everyone_by_default(make_run):
    assert draw_sites(make_run().federation, 0, roster(5), 1) == roster(5)


@pytest.mark.parametrize(("share", "least", "expected"), [(0.5, 2, 5), (0.1, 2, 2), (0.1, 4, 4), (0.99, 2, 10)])
def test_how_many(make_run, share, least, expected):
    run = make_run(f"[federation]\nparticipation = {share}\nmin-sites = {least}\n")
    assert len(draw_sites(run.federation, run.seed, roster(10), 1)) == expected


def test_the_draw_depends_on_round_and_names_only(make_run):
    run = make_run("[federation]\nparticipation = 0.3\n")
    first = names(run, roster(10), 1)
    assert names(run, roster(10), 1) == first
    renumbered = {1000 - node_id: handshake for node_id, handshake in roster(10).items()}
    assert set(names(run, renumbered, 1)) == set(first)
    assert names(run, roster(10), 2) != first


def test_all_sites_have_their_turn(make_run):
    run = make_run("[federation]\nparticipation = 0.3\n")
    turns = Counter(name for number in range(1, 201) for name in names(run, roster(10), number))
    assert len(turns) == 10
    assert all(30 <= count <= 90 for count in turns.values())  # 60 expected, standard deviation 6.5
