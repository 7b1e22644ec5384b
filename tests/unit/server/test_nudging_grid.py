"""Pings to nodes that owe a reply."""

from types import SimpleNamespace

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from server import exchange as exchange_module
from server import nudging_grid
from server.exchange import Exchange
from server.nudging_grid import NudgingGrid
from server.ping import PING


class PlayedGrid:
    """Nodes that answer at once; those that lag send a reply when the next message arrives."""

    def __init__(self, *, lagging=(), silent=()) -> None:
        self.lagging, self.silent = {*lagging}, {*silent}
        self.sent: list[tuple[int, str]] = []
        self.ready: dict[str, Message] = {}
        self.held: dict[int, dict[str, Message]] = {}
        self.is_down = False

    def push_messages(self, messages):
        if self.is_down:
            raise httpx.ConnectError("down")
        return [self._take(message) for message in messages]

    def _take(self, message):
        node_id, name = message.metadata.dst_node_id, f"id-{len(self.sent)}"
        message.metadata.__dict__["_message_id"] = name
        self.sent.append((node_id, message.metadata.message_type))
        self.ready |= self.held.pop(node_id, {})
        if node_id not in self.silent:
            arrives = self.held.setdefault(node_id, {}) if node_id in self.lagging else self.ready
            arrives[name] = Message(RecordDict(), reply_to=message)
        return name

    def pull_messages(self, message_ids):
        return [self.ready.pop(name) for name in message_ids if name in self.ready]


@pytest.fixture
def clock(monkeypatch):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    clock = SimpleNamespace(now=0.0)
    clock.monotonic, clock.sleep = lambda: clock.now, lambda seconds: setattr(clock, "now", clock.now + seconds)
    for module in (nudging_grid, exchange_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def train(*nodes):
    return [Message(RecordDict(), node_id, "train", ttl=600.0, group_id="1") for node_id in nodes]


def pings(grid, node_id):
    return grid.sent.count((node_id, PING))


def test_a_node_that_sends_each_reply_one_message_late_answers_round_after_round(clock):
    grid = PlayedGrid(lagging=[2])
    for number in range(1, 4):
        begin = clock.now
        exchange = Exchange(NudgingGrid(grid, 0.0), train(1, 2), 600.0)
        assert {reply.metadata.src_node_id for reply in exchange} == {1, 2}
        assert 10.0 <= clock.now - begin < 13.0
        assert exchange.failed == {}
        assert (pings(grid, 1), pings(grid, 2)) == (0, number)


def test_a_node_that_answers_in_time_is_not_pinged(clock):
    grid = PlayedGrid()
    assert len([*Exchange(NudgingGrid(grid, 0.0), train(1, 2), 600.0)]) == 2
    assert grid.sent == [(1, "train"), (2, "train")]


def test_the_longer_a_node_takes_the_fewer_are_its_pings(clock):
    grid = PlayedGrid(silent=[1])
    exchange = Exchange(NudgingGrid(grid, 0.0), train(1), 3600.0)
    assert [*exchange] == []
    assert exchange.late == {1}
    assert 30 < pings(grid, 1) < 50


def test_a_ping_that_cannot_be_sent_fails_nothing(clock):
    grid = PlayedGrid(silent=[1])
    nudging = NudgingGrid(grid, 0.0)
    [message_id] = nudging.push_messages(train(1))
    grid.is_down, clock.now = True, 11.0
    assert nudging.pull_messages([message_id]) == []
    grid.is_down, clock.now = False, 22.0
    assert nudging.pull_messages([message_id]) == []
    assert pings(grid, 1) == 1
