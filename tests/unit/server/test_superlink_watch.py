"""An outage of the SuperLink is two events: when it is noticed, and when it is over."""

import threading
import time
from types import SimpleNamespace

import pytest

from panfm.report.run_events import EventKind, read_events
from server import superlink_watch
from server.events import EventLog
from server.superlink_watch import superlink_watched


class Link:
    """Answers, or keeps its caller waiting as Flower's client does, or raises."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.error: Exception | None = None

    def get_node_ids(self):
        self.answers.wait()
        if self.error:
            raise self.error
        return [7]


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The watch's clock, which the test alone moves on."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(superlink_watch, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(superlink_watch, "_ASKED_EVERY_S", 0.01)
    monkeypatch.setattr(superlink_watch, "_LOOK_S", 0.01)
    return clock


def levels(folder):
    return [event.details["level"] for event in read_events(folder) if event.kind == EventKind.SUPERLINK]


def wait_for(folder, expected, clock):
    """Let time go by while an outage is to be noticed."""
    deadline = time.monotonic() + 20
    while levels(folder) != expected:
        assert time.monotonic() < deadline, levels(folder)
        clock.now += 5.0 * (expected[-1] == "down")
        time.sleep(0.01)


def test_each_outage_is_told_once(tmp_path, clock):
    link, log = Link(), EventLog(tmp_path)
    log.begin("run", 0)
    with superlink_watched(link, log):
        link.answers.clear()
        wait_for(tmp_path, ["down"], clock)
        link.answers.set()
        wait_for(tmp_path, ["down", None], clock)
        link.error = OSError("cut off")
        wait_for(tmp_path, ["down", None, "down"], clock)
        link.error = None
        wait_for(tmp_path, ["down", None, "down", None], clock)


def test_nothing_is_noted_before_a_run_begins_or_after_its_end(tmp_path, clock):
    link, log = Link(), EventLog(tmp_path)
    link.error = OSError("down")
    with superlink_watched(link, log):
        clock.now += 100.0
        time.sleep(0.05)
        assert read_events(tmp_path) == []
        log.begin("run", 0)
        wait_for(tmp_path, ["down"], clock)
        log.note(EventKind.STOPPED, "by the coordinator")
        link.error = None
        time.sleep(0.05)
    assert levels(tmp_path) == ["down"]


def test_an_outage_lasts_over_a_resume(tmp_path, clock):
    link, log = Link(), EventLog(tmp_path)
    log.begin("run", 0)
    link.error = OSError("down")
    with superlink_watched(link, log):
        wait_for(tmp_path, ["down"], clock)
    again = EventLog(tmp_path)
    again.begin("run", 1)
    with superlink_watched(Link(), again):
        wait_for(tmp_path, ["down", None], clock)
