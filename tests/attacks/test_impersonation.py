"""A node answers in the name of a site that is another node's, or puts its own errors down to that site."""

import pytest
from flwr.app import Error

from server.expected_sites import ExpectedSite, ExpectedSites
from server.handshake import Attendance, read_handshake, shake_hands
from server.membership import Membership
from tests.attacks.wire import answer_of
from tests.unit.server.test_handshake import Nodes as Answers
from tests.unit.server.test_membership import Nodes, begin, names, nodes  # noqa: F401

BLAME = "site b: BudgetError: this site's privacy budget does not cover another round"


def vanish(nodes: Nodes, roster: Membership) -> None:  # noqa: F811
    """Node 12 of site b goes offline, and node 30 answers as b."""
    del nodes.online[12]
    nodes.online[30] = "b"
    for number in (1, 2):
        assert roster.gather(number).keys() == {11, 13}


def test_a_node_does_not_take_the_seat_of_a_site_that_is_offline_for_a_moment(nodes, caplog):  # noqa: F811
    roster = begin(nodes, "a", "b", "c")
    vanish(nodes, roster)
    assert roster.away(2, ["a", "c"]) == {
        "b": "offline",
        "node 30": "cannot join: site b is node 12, offline for less than 60 s",
    }
    assert caplog.text.count("node 30 cannot join") == 1
    nodes.now += 59
    assert roster.gather(3).keys() == {11, 13}
    nodes.online[12] = "b"
    nodes.now += 60
    assert roster.gather(4).keys() == {11, 12, 13}
    assert roster.moved == {}


def test_a_name_that_moves_to_another_node_is_told(nodes, caplog):  # noqa: F811
    roster = begin(nodes, "a", "b", "c")
    vanish(nodes, roster)
    nodes.now += 60
    assert roster.gather(3).keys() == {11, 13, 30}
    assert roster.moved == {"b": "moved from node 12 to node 30, which says it is this site"}
    assert "b moved from node 12 to node 30" in caplog.text
    nodes.online[12] = "b"
    asked = names(roster.gather(4))
    assert roster.moved == {}
    assert roster.away(4, asked) == {"node 12": "cannot join: another node is online as site b"}


def test_a_site_that_got_a_new_node_id_is_back_while_the_run_waits_for_it(nodes):  # noqa: F811
    roster = begin(nodes, "a", "b")
    del nodes.online[12]
    nodes.online[30] = "b"
    assert roster.gather(1).keys() == {11, 30}
    assert 60 <= nodes.now < 61


def test_with_a_table_of_expected_sites_no_name_moves(nodes):  # noqa: F811
    roster = begin(nodes, "a", "b", "c")
    roster.attendance.expected = ExpectedSites({site: ExpectedSite(5, {"brain-mr": 5}) for site in "abc"})
    vanish(nodes, roster)
    nodes.now += 10_000
    assert roster.gather(3).keys() == {11, 13}
    assert "no name moves" in roster.away(3, ["a", "c"])["node 30"]


def test_a_node_does_not_change_its_site_while_a_run_goes_on(nodes, caplog):  # noqa: F811
    roster = begin(nodes, "a", "b", "c")
    for number in (1, 2):
        roster.note_late({"round": number, "asked": ["a", "b", "c"], "late": ["b"]})
    nodes.online[12] = "another"
    roster.gather(3)
    assert "node 12 cannot join: answered as site b before, now as site another" in caplog.text
    assert names(roster.attendance.roster) == ["a", "b", "c"]


def test_an_error_text_does_not_blame_another_site(nodes, monkeypatch):  # noqa: F811
    grid = Answers({11: 0.0, 77: 0.0}, {11: dict(nodes.handshake("a").to_records().config), 77: Error(1000, BLAME)})
    monkeypatch.setattr("server.handshake.time", grid)
    attendance = shake_hands(grid, nodes.run, nodes.manifest, num_sites=2)
    assert attendance.failed == [f"node 77: {BLAME}"]
    roster = begin(nodes, "a", "c")
    nodes.online[77], nodes.broken, nodes.reason = "b", {77}, BLAME
    roster.gather(1)
    assert roster.away(1, ["a", "c"]) == {"node 77": f"cannot join: {BLAME}"}


@pytest.mark.parametrize("has_table", [True, False])
def test_a_faulty_handshake_does_not_blame_another_site(nodes, has_table):  # noqa: F811
    expected = ExpectedSites({"misfit": ExpectedSite(5, {})}) if has_table else None
    told = dict(nodes.handshake("misfit").to_records().config)
    told |= {"subjects": 50} if has_table else {}
    attendance = Attendance(expected=expected)
    assert read_handshake(answer_of(77, told), nodes.run, nodes.manifest, attendance) is None
    [line] = attendance.failed + attendance.misfits
    assert line.startswith("node 77: site misfit: ")
