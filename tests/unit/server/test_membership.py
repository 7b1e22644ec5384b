"""Sites that come, go, hang and change nodes while a run goes on."""

from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from panfm import __version__
from panfm.config import experiment_hash
from panfm.models import build_model
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Handshake
from server.handshake import Attendance
from server.membership import Membership


class Nodes:
    """A grid: who is online, and what each answers to an invitation once it is ready."""

    def __init__(self, run, manifest) -> None:
        self.run, self.manifest = run, manifest
        self.online: dict[int, str] = {}
        self.busy: set[int] = set()
        self.broken: set[int] = set()
        self.reason = "out of order"
        self.invited: list[int] = []
        self.now = 0.0

    def get_nodes(self):
        return [SimpleNamespace(node_id=2, name="registered-2")]

    def get_node_ids(self) -> list[int]:
        return list(self.online)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            self.invited.append(node_id)
            ids.append(f"{len(self.invited)}/{node_id}")
        return ids

    def pull_messages(self, ids):
        [name] = ids
        node_id = int(name.split("/")[1])
        if node_id in self.busy or node_id not in self.online:
            return []
        asked = Message(RecordDict(), node_id, "query")
        asked.metadata.__dict__["_message_id"] = name
        if node_id in self.broken:
            return [Message(Error(1000, self.reason), reply_to=asked)]
        config = ConfigRecord(dict(self.handshake(self.online[node_id]).to_records().config))
        return [Message(RecordDict({"config": config}), reply_to=asked)]

    def handshake(self, site: str) -> Handshake:
        groups = {group: self.manifest.hashes()[group] for group in ("backbone", "head", "stream:brain-mr")}
        subjects = 0 if site == "misfit" else 5
        return Handshake(site, subjects, {"brain-mr": 5}, {"panfm": __version__}, experiment_hash(self.run), groups)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def nodes(make_run, monkeypatch) -> Nodes:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    run = make_run()
    model = build_model(run)
    made = Nodes(run, GroupManifest.of(model.parameter_groups(), model.state_dict()))
    for module in ("server.membership", "server.exchange"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=made.monotonic, sleep=made.sleep))
    return made


def begin(nodes: Nodes, *sites: str) -> Membership:
    """Those sites came before round 1, on nodes 11, 12, ..."""
    nodes.online = {11 + index: site for index, site in enumerate(sites)}
    roster = {node_id: nodes.handshake(site) for node_id, site in nodes.online.items()}
    return Membership(nodes, nodes.run, nodes.manifest, Attendance(roster, asked=list(roster)))


def names(sites: dict[int, Handshake]) -> list[str]:
    return [handshake.site for handshake in sites.values()]


def line(number: int, *asked: str, late: tuple[str, ...] = ()) -> dict:
    return {"round": number, "asked": asked, "late": late}


def test_all_that_came_are_asked(nodes):
    roster = begin(nodes, "a", "b", "c")
    assert names(roster.gather(1)) == ["a", "b", "c"]
    assert nodes.invited == []


def test_who_is_offline_is_not_asked_and_comes_back_without_a_handshake(nodes, caplog):
    roster = begin(nodes, "a", "b", "c")
    del nodes.online[12]
    assert names(roster.gather(1)) == ["a", "c"]
    assert names(roster.gather(2)) == ["a", "c"]
    assert caplog.text.count("b is offline") == 1
    nodes.online[12] = "b"
    assert names(roster.gather(3)) == ["a", "b", "c"]
    assert "round 3: b is back" in caplog.text
    assert nodes.invited == []


def test_a_new_site_shakes_hands_and_nobody_waits_for_it(nodes):
    roster = begin(nodes, "a", "c")
    nodes.online[20], nodes.busy = "b", {20}
    for number in (1, 2):
        assert names(roster.gather(number)) == ["a", "c"]
    assert (nodes.invited, nodes.now) == ([20], 0.0)
    nodes.busy = set()
    assert names(roster.gather(3)) == ["a", "b", "c"]
    assert names(roster.attendance.roster) == ["a", "b", "c"]


def test_who_could_not_take_part_at_the_start_is_invited_before_every_round(nodes):
    """A site is refused until its operator approves the run, and then joins."""
    roster = begin(nodes, "a", "c")
    nodes.online[20], nodes.broken, nodes.reason = "b", {20}, "site b: PendingApprovalError: experiment 1a waits"
    roster = Membership(nodes, nodes.run, nodes.manifest, Attendance(roster.attendance.roster, asked=[11, 12, 20]))
    for number in (1, 2):
        assert names(roster.gather(number)) == ["a", "c"]
        assert roster.away(number, ["a", "c"]) == {"node 20": f"cannot join: {nodes.reason}"}
    assert nodes.invited == [20, 20]
    nodes.broken = set()
    assert names(roster.gather(3)) == ["a", "b", "c"]


def test_a_misfit_is_left_out_and_asked_again_only_when_it_comes_anew(nodes, caplog):
    roster = begin(nodes, "a", "c")
    nodes.online[20] = "misfit"
    for number in (1, 2):
        assert names(roster.gather(number)) == ["a", "c"]
    assert nodes.invited == [20]
    assert "cannot join: site misfit: 0 subjects" in caplog.text
    del nodes.online[20]
    roster.gather(3)
    nodes.online[20] = "b"
    assert names(roster.gather(4)) == ["a", "b", "c"]


def test_who_answers_with_an_error_is_invited_again_before_the_next_round(nodes, caplog):
    roster = begin(nodes, "a", "b")
    nodes.online[13] = "c"
    nodes.broken = {13}
    assert [names(roster.gather(number)) for number in (1, 2)] == [["a", "b"]] * 2
    assert "cannot join: out of order" in caplog.text
    nodes.broken = set()
    assert names(roster.gather(3)) == ["a", "b", "c"]
    assert nodes.invited == [13, 13, 13]


def test_a_site_may_come_back_as_another_node_but_not_twice(nodes, caplog):
    roster = begin(nodes, "a", "b", "c")
    nodes.online[30] = "b"
    assert list(roster.gather(1)) == [11, 12, 13]
    assert "another node is online as site b" in caplog.text
    del nodes.online[12], nodes.online[30]
    roster.gather(2)
    nodes.online[30] = "b"
    assert roster.gather(3).keys() == {11, 13}
    nodes.now += 60
    assert roster.gather(4).keys() == {11, 30, 13}


def test_a_site_that_hangs_rests_longer_and_longer(nodes):
    roster = begin(nodes, "a", "b", "c")
    asked = []
    for number in range(1, 20):
        sites = names(roster.gather(number))
        if "b" in sites:
            asked.append(number)
        roster.note_late(line(number, *sites, late=("b",) if "b" in sites else ()))
    assert asked == [1, 2, 4, 8, 16]


def test_one_answer_in_time_and_all_is_forgotten(nodes):
    roster = begin(nodes, "a", "b", "c")
    for number, late in ((1, ("b",)), (2, ("b",)), (4, ()), (5, ("b",))):
        assert "b" in names(roster.gather(number))
        roster.note_late(line(number, "a", "b", "c", late=late))
    assert "b" in names(roster.gather(6))


def test_who_rests_is_asked_if_there_are_too_few(nodes):
    roster = begin(nodes, "a", "b")
    for number in (1, 2):
        roster.note_late(line(number, "a", "b", late=("b",)))
    assert names(roster.gather(3)) == ["a", "b"]


def test_it_waits_for_a_quorum_but_not_for_ever(nodes):
    roster = begin(nodes, "a", "b")
    del nodes.online[12]
    assert names(roster.gather(1)) == ["a"]
    assert 120 <= nodes.now <= 121.5


def test_a_silent_site_costs_two_deadlines_and_is_back_once_it_answers(nodes, caplog):
    """A SuperNode that waits for good looks online all the same."""
    roster = begin(nodes, "a", "b", "c")
    nodes.busy = {12}
    told = {}
    for number in range(1, 40):
        if number == 31:
            nodes.busy = set()  # started again
        sites = names(roster.gather(number))
        told[number] = roster.away(number, sites)
        roster.note_late(line(number, *sites, late=("b",) if "b" in sites and number < 31 else ()))
    why = "silent: no reply by the deadline of rounds 1, 2; not asked until it answers an invitation"
    assert [number for number, away in told.items() if not away] == [1, 2, *range(31, 40)]
    assert told[3] == told[30] == {"b": why}
    assert f"round 2: b is online but {why}" in caplog.text
    assert "b answers again" in caplog.text
    assert nodes.invited == [12]  # one that is not yet answered is not sent again


def test_a_silent_site_whose_invitation_was_lost_is_invited_again(nodes):
    roster = begin(nodes, "a", "b", "c")
    nodes.busy = {12}
    for number in (1, 2):
        roster.gather(number)
        roster.note_late(line(number, "a", "b", "c", late=("b",)))
    roster.gather(3)
    nodes.now += 3601
    roster.gather(4)
    roster.gather(5)
    assert nodes.invited == [12, 12]
    del nodes.online[12]
    assert roster.away(6, names(roster.gather(6))) == {"b": "offline"}
    nodes.online[12], nodes.busy = "b", set()
    assert "b" in names(roster.gather(7))


def test_a_site_that_answers_but_is_always_late_rests(nodes):
    roster = begin(nodes, "a", "b", "c")
    for number in (1, 2):
        roster.note_late(line(number, "a", "b", "c", late=("b",)))
    assert "b" not in names(roster.gather(3))
    assert roster.away(3, ["a", "c"]) == {"b": "answers again, rests until round 3"}
    assert "b" in names(roster.gather(4))


def test_a_silent_site_may_come_back_as_another_node(nodes):
    roster = begin(nodes, "a", "b", "c")
    nodes.busy = {12}
    for number in (1, 2):
        roster.note_late(line(number, "a", "b", "c", late=("b",)))
    del nodes.online[12]
    nodes.online[30] = "b"
    roster.gather(3)
    nodes.now += 60
    assert roster.gather(3).keys() == {11, 13}  # it rests
    assert roster.gather(4).keys() == {11, 13, 30}


def test_why_a_node_cannot_join_is_told_as_long_as_it_is_online(nodes):
    roster = begin(nodes, "a", "b")
    nodes.online |= {20: "misfit", 21: "a"}
    asked = names(roster.gather(1))
    assert roster.away(1, asked) == {
        "node 20": "cannot join: site misfit: 0 subjects, expected 1 to 1000000 (federation.max-subjects)",
        "node 21": "cannot join: another node is online as site a",
    }
    del nodes.online[20], nodes.online[21]
    assert roster.away(2, names(roster.gather(2))) == {}


def test_words_of_a_node_are_one_printable_line(nodes):
    roster = begin(nodes, "a", "b")
    nodes.online[13], nodes.broken = "c", {13}
    nodes.reason = "out\n of \x1b[31morder" + "x" * 1000
    roster.gather(1)
    [reason] = roster.away(1, ["a", "b"]).values()
    assert reason.startswith("cannot join: out of ?[31morder")
    assert len(reason) <= 313
