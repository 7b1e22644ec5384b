"""Runs that lose their quorum: the real ServerApp, ClientApp and files in process; only sleeps move the clock."""

import json
import pickle
import threading
from types import SimpleNamespace

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error

from client.app import app as client_app
from panfm.errors import RunError
from panfm.privacy.ledger import FILE
from panfm.report.run_events import EventKind, read_events
from panfm.report.run_files import read_run
from panfm.report.run_progress import read_progress
from panfm.report.status import left_out
from server.app import app as server_app
from server.metrics import metrics_text
from server.quorum import NoQuorumError
from server.run_folder import RunFolder
from simulations.engines.local import LocalGrid
from tests.federation.conftest import GATED, SUMMED, TASKS

ALPHA, BETA, GAMMA = 2, 3, 4
NODES = {ALPHA: "alpha", BETA: "beta", GAMMA: "gamma"}
PENDING = "site gamma: PendingApprovalError: experiment 123 waits for this site's approval"


PRIVATE = (
    "objective.standardise=false",
    "masking.policy=random",
    "patient-dp.epsilon=10.0",
    "patient-dp.delta=1e-3",
    "patient-dp.public-subjects=50",
    "patient-dp.noise-multiplier=1.0",
    "patient-dp.sample-rate=0.5",
)


class Real(LocalGrid):
    """Sites that the server takes for real ones, and what becomes of some questions to them.

    `lost(message type, group id, node id, attempt)` tells: `late`, a reason of an error reply, or nothing.
    """

    def __init__(self, job, clock, lost) -> None:
        super().__init__(client_app, job.num_sites, job.run_config())
        self.lost, self.clock = lost, clock
        self.asked: dict[tuple, int] = {}
        self.online = set(NODES)
        self.fates: dict[str, str] = {}

    def get_node_ids(self):
        if threading.current_thread() is threading.main_thread():  # the watch of the SuperLink takes no made-up time
            self.clock.tick()
        return [node for node in super().get_node_ids() if node in self.online]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            about = message.metadata
            key = (about.message_type, about.group_id, about.dst_node_id)
            self.asked[key] = self.asked.get(key, 0) + 1
            [name] = super().push_messages([message])
            self.fates[name] = self.lost(*key, self.asked[key]) or ""
            ids.append(name)
        return ids

    def pull_messages(self, message_ids):
        replies = []
        for name in message_ids:
            if self.fates[name] == "late":
                continue
            if self.fates[name]:
                asked = self._pending.pop(name)
                replies.append(Message(Error(1000, self.fates[name]), reply_to=asked))
                continue
            replies += super().pull_messages([name])
        return replies


class Clock:
    def __init__(self) -> None:
        self.now = self.between_looks = 0.0
        self.events: list = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def tick(self) -> None:
        self.now += self.between_looks
        for at, act in list(self.events):
            if self.now >= at:
                self.events.remove((at, act))
                act()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    time = SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    for module in ("exchange", "quorum", "handshake", "membership", "ping", "round_attempt"):
        monkeypatch.setattr(f"server.{module}.time", time)
    return clock


def start(federation, clock, name, lost, *overrides, change=lambda grid: None):
    """Run over sites that the server takes for real; returns job and grid."""
    job = federation.job(name, "train.rounds=2", "federation.min-sites=3", *overrides)
    grid = Real(job, clock, lost)
    change(grid)
    words = {key: value for key, value in job.run_config().items() if key != "sites"}
    server_app(grid, Context(1, 1, {}, RecordDict(), words))
    return job, grid


def lines(job):
    return [json.loads(line) for line in (job.run_dir / "rounds.jsonl").read_text().splitlines()]


def model(run_dir):
    return (run_dir / "model" / "model.safetensors").read_bytes()


def kinds(run_dir):
    return [event.kind for event in read_events(run_dir)]


def gamma(fate, group="2", attempts=1, kind="train"):
    """Only gamma's first answers to one question are lost."""
    return lambda *asked: fate if asked[:3] == (kind, group, GAMMA) and asked[3] <= attempts else None


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["late", "internal error (OSError)", PENDING])
def test_a_round_without_a_quorum_is_asked_again_with_the_same_bits(federation, clock, fate):
    """A late reply of the first attempt stays where it is; the site answers the second with the same state."""
    job, grid = start(federation, clock, "again", gamma(fate))
    assert [(line["round"], len(line["sites"])) for line in lines(job)] == [(1, 3), (2, 3)]
    assert grid.asked["train", "2", ALPHA] == grid.asked["train", "2", GAMMA] == 2
    assert {EventKind.WAITING, EventKind.QUORUM, EventKind.FINISHED} <= set(kinds(job.run_dir))
    [waiting] = [event for event in read_events(job.run_dir) if event.kind == EventKind.WAITING]
    assert "round 2: 2 good replies, at least 3 needed (federation.min-sites): gamma: " in waiting.words
    assert model(job.run_dir) == model(federation.run("local", "train.rounds=2", "federation.min-sites=3"))
    progress = read_progress(job.run_dir)
    assert (progress.step, progress.answered, progress.waiting) == ("round 2", sorted(NODES.values()), None)


@pytest.mark.slow
def test_a_site_that_is_offline_is_waited_for_and_nobody_is_asked_meanwhile(federation, clock):
    def goes(grid):
        def lost(kind, group, node, attempt):
            if (kind, group, node) == ("train", "1", GAMMA):
                grid.online.discard(GAMMA)
                clock.events.append((clock.now + 5000.0, lambda: grid.online.add(GAMMA)))

        grid.lost = lost

    job, grid = start(federation, clock, "offline", None, change=goes)
    assert grid.asked["train", "2", ALPHA] == 1
    assert clock.now > 5000.0
    assert model(job.run_dir) == model(federation.run("local", "train.rounds=2", "federation.min-sites=3"))


@pytest.mark.slow
@pytest.mark.parametrize(("wait_s", "words"), [(0.0, ""), (3600.0, "waited 3600 s")])
def test_a_run_ends_when_the_time_is_over(federation, clock, wait_s, words):
    with pytest.raises(RunError, match=rf"round 2: 2 good replies, at least 3 needed .* gamma: away.*{words}"):
        start(federation, clock, "over", gamma("away", attempts=10**6), f"federation.wait-for-quorum-s={wait_s}")
    run_dir = federation.folder / "over"
    assert wait_s <= clock.now < wait_s + 400
    assert kinds(run_dir)[-1] == EventKind.FAILED
    assert json.loads((run_dir / "ended.json").read_text())["can-heal"]
    assert RunFolder.resume(run_dir).latest_state().round_number == 1


@pytest.mark.parametrize(
    "kind", ["BudgetError", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("LimitError", "ProtocolError"))]
)
def test_a_decision_of_a_site_that_the_quorum_needs_ends_a_run_at_once(federation, clock, kind):
    with pytest.raises(RunError, match=f"gamma: {kind}: no"):
        start(federation, clock, "no", gamma(f"site gamma: {kind}: no"))
    assert clock.now < 60.0
    run_dir = federation.folder / "no"
    assert not json.loads((run_dir / "ended.json").read_text())["can-heal"]
    assert [line["rejected"] for line in lines(SimpleNamespace(run_dir=run_dir))][1] == {"gamma": f"{kind}: no"}


@pytest.mark.slow
def test_a_refusal_beside_a_site_that_was_not_asked_does_not_end_a_run(federation, clock):
    """Two of three are enough: gamma refuses for good, beta is away and comes back."""

    def goes(grid):
        def lost(kind, group, node, attempt):
            if (kind, group, node) == ("train", "1", BETA):
                grid.online.discard(BETA)
                clock.events.append((clock.now + 1000.0, lambda: grid.online.add(BETA)))
            return "site gamma: BudgetError: no" if (kind, group, node) == ("train", "2", GAMMA) else None

        grid.lost = lost

    job, _ = start(federation, clock, "beside", None, "federation.min-sites=2", change=goes)
    assert [sorted(line["sites"]) for line in lines(job)] == [["alpha", "beta", "gamma"], ["alpha", "beta"]]


@pytest.mark.parametrize("fate", [pytest.param("late", marks=pytest.mark.slow), PENDING])
def test_an_invitation_is_repeated_until_there_is_a_quorum(federation, clock, fate):
    job, grid = start(federation, clock, "pending", gamma(fate, group="0", attempts=3, kind="query"))
    assert grid.asked["query", "0", GAMMA] == 4
    assert lines(job)[0]["asked"] == sorted(NODES.values())


@pytest.mark.slow
def test_constants_are_summed_over_the_quorum(labelled, clock):
    job, grid = start(labelled, clock, "sums", gamma("away", group="inputs-1", kind="evaluate"), *SUMMED)
    assert grid.asked["evaluate", "inputs-1", GAMMA] == 2
    told = json.loads((job.run_dir / "inputs.json").read_text())
    assert told["left-out"] == {}
    assert told["streams"]["brain-mr"]["sites"] == ["alpha", "gamma"]


@pytest.mark.slow
def test_a_site_that_does_not_answer_a_ping_holds_up_no_round(federation, clock):
    """Its SuperNode is online and answers nothing from round 1 on; it comes back when its invitation is answered."""

    def wedges(grid):
        def lost(kind, group, node, attempt):
            is_wedged = (group == "ping" and attempt == 1) or (group == "0" and attempt == 2)
            return "late" if node == GAMMA and is_wedged else None

        grid.lost, clock.between_looks = lost, 20.0

    overrides = ("train.rounds=6", "federation.min-sites=2", "federation.ping-timeout-s=15.0")
    job, grid = start(federation, clock, "ping", None, *overrides, change=wedges)
    told = lines(job)
    away = [line["away"].get("gamma", "") for line in told]
    assert away[0].startswith("not answering: no reply within 15 s to a ping before round 1")
    assert away[-1] == ""
    assert "gamma" in told[-1]["sites"]
    assert max(line["seconds"] for line in told) < 10.0
    assert grid.asked["query", "0", GAMMA] == 3


@pytest.mark.slow
def test_a_private_round_that_is_asked_again_is_paid_for_once(federation, clock):
    """Gamma's replies to two attempts come late: all three sites repeat the reply that they have paid for."""
    job, grid = start(federation, clock, "private", gamma("late", attempts=2), *PRIVATE)
    assert [sorted(line["sites"]) for line in lines(job)] == [sorted(NODES.values())] * 2
    for site in NODES.values():
        entries = (federation.sites / site / ".panfm" / "ledger" / FILE).read_text().splitlines()
        assert [json.loads(entry)["kind"] for entry in entries] == ["opened", "round", "round"], site
    assert grid.asked["train", "2", ALPHA] == grid.asked["train", "2", GAMMA] == 3


@pytest.mark.slow
def test_a_site_that_may_still_join_takes_the_place_of_one_that_refuses_for_good(federation, clock):
    """Two of three are enough: beta refuses for good; gamma waits for its operator's approval when round 2 begins."""

    def lost(kind, group, node, attempt):
        if (kind, node) == ("query", GAMMA) and attempt <= 4:
            return PENDING
        return "site beta: BudgetError: no" if (kind, group, node) == ("train", "2", BETA) else None

    job, _ = start(federation, clock, "instead", lost, "federation.min-sites=2")
    assert [sorted(line["sites"]) for line in lines(job)] == [["alpha", "beta"], ["alpha", "gamma"]]
    assert lines(job)[1]["rejected"] == {"beta": "BudgetError: no"}
    [waiting] = [event for event in read_events(job.run_dir) if event.kind == EventKind.WAITING]
    assert "beta: BudgetError: no" in waiting.words


def test_a_round_that_does_not_count_is_not_done(federation, clock):
    with pytest.raises(RunError, match="gamma: BudgetError: no"):
        start(federation, clock, "undone", gamma("site gamma: BudgetError: no"))
    run = read_run(federation.folder / "undone")
    assert [line["round"] for line in run.rounds] == [1]
    assert run.uncounted["round"] == 2
    assert [entry[0] for entry in left_out(run)] == ["gamma"]
    [done] = [line for line in metrics_text(run).splitlines() if line.startswith("panfm_run_rounds_done{")]
    assert done.endswith(" 1")
    assert (run.events[-1].kind, run.events[-1].round) == (EventKind.FAILED, 1)


@pytest.mark.slow
def test_the_gate_waits_for_a_quorum_after_a_round(labelled, clock):
    """Measures and decisions are those of a run in which nobody was away."""

    def lost(kind, group, node, attempt):
        return "away" if group == "gate-2" and node in (BETA, GAMMA) and attempt <= 2 else None

    job, grid = start(labelled, clock, "gate", lost, TASKS, GATED)
    assert grid.asked["evaluate", "gate-2", ALPHA] == 3
    [waiting] = [event for event in read_events(job.run_dir) if event.kind == EventKind.WAITING]
    assert waiting.words.startswith("gate after round 1: 1 answers, 3 needed")
    expected = labelled.run("local", "train.rounds=2", "federation.min-sites=3", TASKS, GATED)
    told = [{**line["gate"], "seconds": 0} for line in read_run(expected).rounds]
    assert [{**line["gate"], "seconds": 0} for line in lines(job)] == told
    assert model(job.run_dir) == model(expected)


def test_a_lost_quorum_comes_whole_out_of_a_worker_process():
    """Without its own way to be pickled it broke the pool of a study, and its reason was lost."""
    error = NoQuorumError("round 2: 1 good replies", can_heal=True, line={"round": 2})
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.can_heal, again.line) == ("round 2: 1 good replies", True, {"round": 2})
