from types import SimpleNamespace

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import records as client_records
from server import exchange as module
from server.exchange import ASKED_AGAIN, Exchange
from server.retrying_grid import ReplyLostError


class Clock:
    """Time passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


class FakeGrid:
    """Node n answers after `delays[n]` seconds; an Error when the delay comes with one."""

    def __init__(self, clock: Clock, delays: dict[int, object]) -> None:
        self.clock, self.delays, self.pending, self.pulled = clock, delays, {}, []
        self.records: tuple[str, ...] = ()
        """Names of the records of each reply."""
        self.refusals: dict[int, int] = {}
        """Node -> messages to it that raise first."""

    def push_messages(self, messages):
        for message in messages:
            if self.refusals.get(message.metadata.dst_node_id, 0) > 0:
                self.refusals[message.metadata.dst_node_id] -= 1
                message.metadata.__dict__["_message_id"] = "lost"
                raise RuntimeError("an object could not be stored")
            assert not message.metadata.message_id
            if self.delays[message.metadata.dst_node_id] == "unreachable":
                return [None]
            name = f"id-{message.metadata.dst_node_id}"
            message.metadata.__dict__["_message_id"] = name
            self.pending[name] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids):
        assert len(ids) == 1
        message = self.pending[ids[0]]
        delay = self.delays[message.metadata.dst_node_id]
        after, error = delay if isinstance(delay, tuple) else (delay, None)
        if self.clock.now - 100 < after:
            return []
        self.pulled.append(ids[0])
        content = RecordDict(dict.fromkeys(self.records, MetricRecord()))
        return [Message(error or content, reply_to=message)]


@pytest.fixture
def clock(monkeypatch) -> Clock:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
    return clock


def ask(clock: Clock, delays: dict[int, object], timeout_s: float = 60.0) -> tuple[Exchange, list[int], FakeGrid]:
    grid = FakeGrid(clock, delays)
    messages = (Message(RecordDict(), node_id, "train") for node_id in delays)
    exchange = Exchange(grid, messages, timeout_s)
    return exchange, [reply.metadata.src_node_id for reply in exchange], grid


def test_replies_come_in_their_own_order(clock):
    exchange, order, _ = ask(clock, {2: 5.0, 3: 1.0, 4: 0.0})
    assert order == [4, 3, 2]
    assert exchange.failed == {}
    assert list(exchange.seconds) == order
    assert exchange.seconds[2] == pytest.approx(5.0, rel=0.1)


def test_an_error_is_put_down_to_the_node_that_was_asked(clock):
    exchange, order, _ = ask(clock, {2: (0.0, Error(5, "Node Unavailable")), 3: 0.0, 4: (0.0, Error(8))})
    assert order == [3]
    assert exchange.failed == {2: "Node Unavailable", 4: "error 8"}


def test_who_is_late_is_left_out(clock):
    exchange, order, _ = ask(clock, {2: 61.0, 3: 1.0})
    assert order == [3]
    assert exchange.failed == {2: "no reply within 60 s"}
    assert clock.now - 100 < 63


def test_who_cannot_be_reached_is_left_out(clock):
    exchange, order, _ = ask(clock, {2: "unreachable", 3: 0.0})
    assert order == [3]
    assert exchange.failed == {2: "the message could not be sent"}


def test_what_could_not_be_sent_is_sent_again_under_another_id(clock):
    grid = FakeGrid(clock, {2: 0.0, 3: 0.0})
    grid.refusals[2] = 2
    content = RecordDict()
    exchange = Exchange(grid, [Message(content, node_id, "train", ttl=9.0, group_id="7") for node_id in (2, 3)], 60.0)
    assert [reply.metadata.src_node_id for reply in exchange] == [2, 3]
    about = grid.pending["id-2"].metadata
    assert (about.message_type, about.ttl, about.group_id) == ("train", 9.0, "7")
    assert grid.pending["id-2"].content is content


def test_what_can_never_be_sent_ends_the_exchange(clock):
    grid = FakeGrid(clock, {2: 0.0})
    grid.refusals[2] = 3
    with pytest.raises(RuntimeError, match="stored"):
        Exchange(grid, [Message(RecordDict(), 2, "train")], 60.0)


def test_it_waits_little_and_asks_seldom(clock):
    """Within 5 % of the time waited, with few looks even over an hour."""
    exchange, _, _ = ask(clock, {2: 3000.0}, timeout_s=3600)
    assert exchange.seconds[2] <= 3000 * 1.05
    assert len(clock.sleeps) < 1600
    assert max(clock.sleeps) <= 2.0


def test_a_reply_is_pulled_only_when_the_one_before_was_taken(clock):
    grid = FakeGrid(clock, {2: 0.0, 3: 0.0})
    replies = iter(Exchange(grid, [Message(RecordDict(), node_id, "train") for node_id in (2, 3)], 60.0))
    next(replies)
    assert grid.pulled == ["id-2"]


def test_nobody_asked(clock):
    exchange, order, _ = ask(clock, {})
    assert order == []
    assert exchange.failed == {}


def test_a_question_that_the_superlink_has_lost_is_asked_again_but_not_for_ever(clock):
    """Node 2 loses one, node 3 all; node 4 says that it is gone, which is no loss."""
    grid = FakeGrid(clock, {2: (1.0, Error(3, "lost")), 3: (1.0, Error(4, "lost")), 4: (1.0, Error(5, "gone"))})
    found = []
    pull = grid.pull_messages

    def heals(ids):
        if len(grid.pulled) == 3:
            grid.delays[2] = 1.0
        return pull(ids)

    grid.pull_messages = heals
    exchange = Exchange(grid, (Message(RecordDict(), node_id, "train") for node_id in (2, 3, 4)), 60.0)
    found = [reply.metadata.src_node_id for reply in exchange]
    assert found == [2]
    assert exchange.failed == {3: "lost", 4: "gone"}
    assert [grid.pulled.count(f"id-{node}") for node in (2, 3, 4)] == [2, 3, 1]
    assert exchange.errors == set()


def test_a_reply_that_was_lost_with_the_superlink_is_asked_for_again(clock):
    grid = FakeGrid(clock, {2: 1.0})
    pull, falls = grid.pull_messages, iter([True])

    def pull_messages(ids):
        if clock.now > 101.0 and next(falls, False):
            raise ReplyLostError("the SuperLink went away")
        return pull(ids)

    grid.pull_messages = pull_messages
    changes = []
    exchange = Exchange(
        grid, [Message(RecordDict(), 2, "train")], 60.0, on_change=lambda changed: changes.append(changed.waiting_for)
    )
    assert [reply.metadata.src_node_id for reply in exchange] == [2]
    assert changes == [{2}, set()]


def test_a_worker_that_was_asked_again_is_told_and_leaves_the_reply_as_it_was(clock):
    grid = FakeGrid(clock, {1: 0, 2: (0, Error(1000, "no"))})
    grid.records = (ASKED_AGAIN, "metrics")
    exchange = Exchange(grid, [Message(RecordDict(), node, "train") for node in (1, 2)], 60.0)
    [reply] = exchange
    assert list(reply.content) == ["metrics"]
    assert exchange.worker_lost == {1}
    assert ASKED_AGAIN == client_records.ASKED_AGAIN
