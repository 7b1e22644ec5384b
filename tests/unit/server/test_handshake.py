from dataclasses import replace
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from panfm import __version__
from panfm.config import experiment_hash
from panfm.errors import ProtocolError, RunError
from panfm.models import build_model
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Handshake
from server.handshake import check_handshake, shake_hands


@pytest.fixture
def run(make_run):
    return make_run()


@pytest.fixture
def manifest(run) -> GroupManifest:
    model = build_model(run)
    return GroupManifest.of(model.parameter_groups(), model.state_dict())


def good(run, manifest, site="a", **changes) -> Handshake:
    groups = {group: manifest.hashes()[group] for group in ("backbone", "head", "stream:brain-mr")}
    shaken = Handshake(site, 5, {"brain-mr": 5}, {"panfm": __version__}, experiment_hash(run), groups)
    return replace(shaken, **changes)


def test_a_site_that_fits(run, manifest):
    check_handshake(good(run, manifest), run, manifest)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda h: {"versions": {"panfm": "0.0.1"}}, r"panfm 0\.0\.1, the server has"),
        (lambda h: {"versions": {}}, "panfm None"),
        (
            lambda h: {"experiment": "5e" * 32},
            "its software reads the run description differently: experiment (5e){32}, the server has [0-9a-f]{64}$",
        ),
        (lambda h: {"experiment": "a\n" * 40_000}, r"differently: experiment (a )+a?\.\.\., the server"),
        (
            lambda h: {"group_hashes": {**h.group_hashes, "head": "x", "stream:brain-mr": "x"}},
            "the parameters of head, stream:brain-mr differ",
        ),
        (lambda h: {"group_hashes": {**h.group_hashes, "experts": "x"}}, "unknown group 'experts'"),
        (lambda h: {"streams": {"heart-ct": 5}}, r"missing \['stream:heart-ct'\], not expected \['stream:brain-mr'\]"),
        (lambda h: {"streams": {}}, "not expected .*stream:brain-mr"),
        (lambda h: {"streams": {"brain-mr": 5, "knee-mr": 5}}, "holds knee-mr, unknown to this run"),
        (lambda h: {"subjects": 0}, "0 subjects, expected 1 to 1000000"),
        (lambda h: {"subjects": 2**62}, r"subjects, expected 1 to 1000000 \(federation.max-subjects\)"),
        (lambda h: {"subjects": -5, "streams": {"brain-mr": -5}}, "-5 subjects"),
        (lambda h: {"streams": {"brain-mr": 0}}, "0 subjects with brain-mr, expected 1 to 5"),
        (lambda h: {"streams": {"brain-mr": 6}}, "6 subjects with brain-mr, expected 1 to 5"),
    ],
)
def test_a_mismatch_tells_the_difference(run, manifest, change, why):
    handshake = good(run, manifest)
    with pytest.raises(ProtocolError, match=why):
        check_handshake(replace(handshake, **change(handshake)), run, manifest)


def test_under_the_plain_rule_every_site_trains_all_groups(run, manifest):
    plain = run.model_copy(update={"sharing": run.sharing.model_copy(update={"rule": "plain"})})
    with pytest.raises(ProtocolError, match="groups it trains: missing"):
        check_handshake(good(plain, manifest), plain, manifest)
    check_handshake(good(plain, manifest, group_hashes=manifest.hashes()), plain, manifest)


class Nodes:
    """A grid of nodes that come online over time and give prepared answers."""

    def __init__(self, online, answers=()) -> None:
        self.online, self.answers, self.now, self.asked = online, dict(answers), 0.0, {}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def get_nodes(self):
        return [SimpleNamespace(node_id=5, name="hospital-5")]

    def get_node_ids(self):
        return [node for node, since in self.online.items() if self.now >= since]

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"to-{message.metadata.dst_node_id}"
            self.asked[message.metadata.message_id] = message
        return list(self.asked)[-1:]

    def pull_messages(self, ids):
        message = self.asked[ids[0]]
        answer = self.answers[message.metadata.dst_node_id]
        content = answer if isinstance(answer, Error) else RecordDict({"config": ConfigRecord(answer)})
        return [Message(content, reply_to=message)]


@pytest.fixture
def nodes(monkeypatch):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def make(online, answers=()) -> Nodes:
        made = Nodes(online, answers)
        monkeypatch.setattr("server.handshake.time", made)
        return made

    return make


def words(handshake: Handshake) -> dict:
    return dict(handshake.to_records().config)


def test_every_site_that_fails_is_named(run, manifest, nodes):
    grid = nodes(
        dict.fromkeys(range(2, 8), 0.0),
        {
            2: words(good(run, manifest, "zeta")),
            3: words(good(run, manifest, "alpha")),
            4: Error(1000, "site beta: DataError: faulty"),
            5: Error(5, "Node Unavailable"),
            6: words(good(run, manifest, "mu")) | {"subjects": "many"},
            7: words(good(run, manifest, "\x1b[31m\n")),
        },
    )
    attendance = shake_hands(grid, run, manifest, num_sites=6)
    assert [shaken.site for shaken in attendance.roster.values()] == ["alpha", "zeta"]
    assert attendance.failed == [
        "node 4: site beta: DataError: faulty",
        "node 5 (hospital-5): Node Unavailable",
        "node 6: message: subjects is str, expected int",
        "node 7: site name '\\x1b[31m\\n', expected small letters, digits, dot, dash",
    ]
    attendance.require(2)
    with pytest.raises(
        RunError, match=r"2 of at least 6 sites can take part: node 4: site beta: DataError: faulty; node 5 "
    ):
        attendance.require(6)


def test_who_contradicts_the_server_stops_the_run(run, manifest, nodes):
    answers = {node: words(good(run, manifest, f"site-{node}")) for node in (2, 3)}
    answers[4] = words(good(run, manifest, "beta", versions={"panfm": "0"}))
    answers[5] = answers[2]
    attendance = shake_hands(nodes(dict.fromkeys(answers, 0.0), answers), run, manifest, num_sites=4)
    assert len(attendance.misfits) == 2
    with pytest.raises(RunError, match=r"site beta: panfm 0, .*; site site-2: 2 nodes answer under this name"):
        attendance.require(1)


@pytest.mark.parametrize(
    ("online", "num_sites", "came", "waited"),
    [
        ({2: 0, 3: 0}, None, 2, 10),
        ({2: 0, 3: 5, 4: 13, 5: 21, 6: 60}, None, 4, 31),
        ({2: 0, 3: 5}, 2, 2, 5),
        ({2: 0, 3: 5, 4: 50}, 3, 3, 50),
        ({2: 0, 3: 115, 4: 119, 5: 300}, None, 3, 120),
    ],
)
def test_it_waits_for_who_is_expected_or_until_nobody_comes(run, manifest, nodes, online, num_sites, came, waited):
    grid = nodes(online, {node: Error(1, "x") for node in online})
    assert len(shake_hands(grid, run, manifest, num_sites=num_sites).failed) == came
    assert grid.now == pytest.approx(waited, abs=0.5)


def test_too_few_online(run, manifest, nodes):
    with pytest.raises(RunError, match="1 of at least 3 sites online after 120 s"):
        shake_hands(nodes({2: 0, 3: 121}), run, manifest, num_sites=3)
