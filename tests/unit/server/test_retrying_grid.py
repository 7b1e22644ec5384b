"""Calls of a Grid while its SuperLink is down, and after."""

from types import SimpleNamespace

import httpx
import pytest
from flwr.serverapp import Grid

from server import retrying_grid
from server.retrying_grid import ReplyLostError, RetryingGrid

REQUEST = httpx.Request("POST", "https://localhost/v1/runtime/get-nodes")
ERRORS = {
    "cut off": httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING]"),
    "ends": httpx.HTTPStatusError("500", request=REQUEST, response=httpx.Response(500)),
}
REFUSED = httpx.HTTPStatusError("401", request=REQUEST, response=httpx.Response(401))


class Falls(Grid):
    """The first calls raise an error."""

    def __init__(self, error: Exception, calls: int) -> None:
        self.error, self.calls = error, calls

    def _call(self):
        if self.calls:
            self.calls -= 1
            raise self.error
        return [7]

    def get_node_ids(self):
        return self._call()

    def push_messages(self, messages):
        return self._call()

    def pull_messages(self, message_ids):
        return self._call()

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def set_run(self, run) -> None:
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic, clock.sleep = lambda: clock.now, lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(retrying_grid, "time", clock)
    return clock


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_call_is_tried_again_until_the_superlink_is_back(clock, error):
    assert RetryingGrid(Falls(error, 8), 3600.0).get_node_ids() == [7]
    assert clock.now == 1 + 2 + 4 + 8 + 16 + 3 * 20


def test_not_for_ever_and_not_when_it_refuses(clock):
    with pytest.raises(httpx.ConnectError):
        RetryingGrid(Falls(ERRORS["cut off"], 10**6), 100.0).get_node_ids()
    assert 75 < clock.now <= 100
    with pytest.raises(httpx.HTTPStatusError):
        RetryingGrid(Falls(REFUSED, 1), 100.0).get_node_ids()


def test_whoever_pushed_or_pulled_is_told_once_it_is_back(clock):
    grid = RetryingGrid(Falls(ERRORS["ends"], 3), 3600.0)
    with pytest.raises(ReplyLostError, match="HTTPStatusError"):
        grid.pull_messages(["id"])
    assert clock.now == 1 + 2
    grid = RetryingGrid(Falls(ERRORS["ends"], 2), 3600.0)
    with pytest.raises(httpx.HTTPStatusError):
        grid.push_messages([])
    assert (grid.push_messages([]), grid.pull_messages(["id"])) == ([7], [7])
